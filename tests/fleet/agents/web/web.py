import json
import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

port, trigger, revision = sys.argv[1:]


class Page(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        what = Path(trigger).read_text() if trigger != "-" and Path(trigger).exists() else ""
        if what == "die":
            os._exit(3)
        if what == "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.path == "/health":
            status, body = (503 if what == "sick" else 200), {"ok": what != "sick"}
        else:
            n = int(self.path.rpartition("=")[2])
            status, body = 200, {"n": n, "answer": 2 * n, "revision": revision}
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


ThreadingHTTPServer(("127.0.0.1", int(port)), Page).serve_forever()
