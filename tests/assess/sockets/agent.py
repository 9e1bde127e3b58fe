import socket

import zmq

from base import BaseAgent

PORT = 7301


class Talker(BaseAgent):
    def __init__(self, port=PORT):
        super().__init__()
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.REP)
        self.socket.bind(f"tcp://*:{port}")
        self.peer = socket.create_connection(("127.0.0.1", 7302))
