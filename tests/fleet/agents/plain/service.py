"""A plain program as people have many of: a REP socket on a fixed port, a second one that answers health."""

import os
import threading

import zmq

PORT = 0  # made by the test
HEALTH_PORT = 0
REVISION = "v1"
DIES_AFTER = 0  # requests; 0: it does not


def answer_health():
    door = zmq.Context.instance().socket(zmq.REP)
    door.bind(f"tcp://*:{HEALTH_PORT}")
    while True:
        request = door.recv_json()
        known = request.get("action") == "health"
        door.send_json({"status": "ok" if known else "error"})


def main():
    threading.Thread(target=answer_health, daemon=True).start()
    door = zmq.Context.instance().socket(zmq.REP)
    door.bind("tcp://*:" + str(PORT))
    answered = 0
    while True:
        request = door.recv_json()
        answered += 1
        if answered == DIES_AFTER:
            os._exit(3)
        number = request.get("n", 0)
        door.send_json({"status": "ok", "n": number, "answer": 2 * number, "revision": REVISION})


if __name__ == "__main__":
    main()
