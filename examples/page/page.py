"""A plain HTTP program on the standard library's server. Nothing here is Interlock's."""

import argparse
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Page(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(200, "application/json", json.dumps({"ok": True}))
        elif self.path == "/":
            self.answer(200, "text/plain; charset=utf-8", os.environ.get("PAGE_TITLE", "a page") + "\n")
        else:
            self.answer(404, "text/plain; charset=utf-8", "no such page\n")

    def answer(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    ThreadingHTTPServer(("127.0.0.1", parser.parse_args().port), Page).serve_forever()
