import logging
import sys

from websockets.sync.server import serve

logging.getLogger("websockets").setLevel(logging.CRITICAL)
port, revision = sys.argv[1:]


def talk(connection):
    connection.send(revision)
    for message in connection:
        connection.send(f"{revision} {message}")


with serve(talk, "127.0.0.1", int(port)) as server:
    server.serve_forever()
