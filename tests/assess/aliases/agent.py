import os as system
import sqlite3 as storage
import threading as t
from json import load as parse
from subprocess import Popen as Begin

import kit as k
import zmq as queue
from zmq import Context as Surroundings

Parent = k.Foundation
make_thread = t.Thread
listen = queue.REP


class Hidden(Parent):
    def setup(self):
        here = Surroundings.instance()
        make = here.socket
        self.door = make(listen)
        door = self.door
        door.bind("tcp://*:" + system.getenv("PORT", "7303"))
        self.worker = make_thread(target=print)
        self.child = Begin(["true"])
        open_it = storage.connect
        self.kept = open_it(":memory:")
        where = "settings.json"
        with open(where) as source:
            self.options = parse(source)

    def answer(self, action):
        return {"health": self.well}[action]()

    def well(self):
        return {"status": "ok"}
