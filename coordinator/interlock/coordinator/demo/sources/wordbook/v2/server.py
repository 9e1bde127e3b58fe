"""A service as they are: a ZeroMQ REP socket on a port, and a second one that answers health checks."""

import json
import sys
import threading

import zmq
from lookup import define


def answer_health(context, port):
    socket = context.socket(zmq.REP)
    socket.bind(f"tcp://127.0.0.1:{port}")
    while True:
        socket.recv()
        socket.send(json.dumps({"status": "ok", "service": "wordbook"}).encode())


def main():
    port, health_port = sys.argv[1:3]
    context = zmq.Context()
    socket = context.socket(zmq.REP)
    socket.bind(f"tcp://127.0.0.1:{port}")
    threading.Thread(target=answer_health, args=(context, health_port), daemon=True).start()
    while True:
        request = json.loads(socket.recv())
        socket.send(json.dumps({"status": "ok", "definition": define(request["word"])}).encode())


if __name__ == "__main__":
    main()
