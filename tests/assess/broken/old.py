# -*- coding: latin-1 -*-
import zmq, sqlite3
from threading import Thread

def main():
    context = zmq.Context()
    server = context.socket(zmq.REP)
    server.bind("tcp://*:7310")
    Thread(target=main).start()
    store = sqlite3.connect("old.db")
    while True:
        try:
            request = server.recv_json()
        except zmq.ZMQError, error:
            print "lost", error
            continue
        if request["action"] == "health":
            server.send_json({"status": "ok"})
        exec "pass"

if __name__ == "__main__":
    main()
