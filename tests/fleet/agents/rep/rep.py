import json
import os
import signal
import sys
from pathlib import Path

import zmq

port, trigger, revision = sys.argv[1:]
sock = zmq.Context().socket(zmq.REP)
sock.bind(f"tcp://127.0.0.1:{port}")
while True:
    try:
        request = json.loads(sock.recv_multipart()[0])
        action, n = request["action"], request.get("n", 0)
    except (ValueError, TypeError, KeyError, AttributeError):
        sock.send_json({"status": "error"})
        continue
    what = Path(trigger).read_text() if trigger != "-" and Path(trigger).exists() else ""
    if what == "die":
        os._exit(3)
    if what == "hang":
        os.kill(os.getpid(), signal.SIGSTOP)
    if action == "health":
        sock.send_json({"status": "sick" if what == "sick" else "ok"})
    else:
        sock.send_json({"n": n, "answer": 2 * n, "revision": revision})
