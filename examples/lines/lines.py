"""A program with a protocol of its own: it greets, and answers each line with the same line in capitals."""

import socketserver
import sys


class Lines(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(b"hello\n")
        for line in self.rfile:
            self.wfile.write(line.upper())


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


with Server(("127.0.0.1", int(sys.argv[1])), Lines) as server:
    server.serve_forever()
