"""import zmq; zmq.Context().socket(zmq.REP).bind("tcp://*:5555"); threading.Thread(); sqlite3.connect("x")"""
import json
import queue
import threading

import redis
from base import BaseAgent

# import subprocess; subprocess.run(["true"]); socket.socket(); yaml.safe_load(open("config.yaml"))
NOTE = """
sock = socket.socket()
def health_check(): return {"status": "ok"}
"""


class Thread:
    """Of sewing."""


class Decoy(BaseAgent):
    """def health(self): threading.Thread(target=self.run).start()"""

    def setup(self, socket=None, subprocess=None):
        self.lock = threading.Lock()
        self.yarn = Thread()
        self.near = redis.Redis()
        self.mail = queue.Queue()
        socket.socket()
        subprocess.run(["no process"])

    def draw(self, widget):
        widget.bind("<Button-1>", self.draw)
        widget.connect("clicked")
        return json.loads(widget.text)

    def say(self):
        print("health", "/health", 'redis.Redis(host="127.0.0.1")')
        return {"health": 100, "status": "zmq.REP"}

    def ping(self):
        while self.mail.qsize():
            eval("self.mail.get()")

    def select(self, query="SELECT * FROM sqlite3"):
        return f"threading.Thread({query})"
