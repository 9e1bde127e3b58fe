import socketserver
import sys

port, revision = sys.argv[1:]


class Lines(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(f"{revision}\n".encode())
        for line in self.rfile:
            self.wfile.write(f"{revision} {line.strip().decode()}\n".encode())


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True


Server(("127.0.0.1", int(port)), Lines).serve_forever()
