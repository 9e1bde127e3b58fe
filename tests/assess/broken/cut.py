import zmq

from base import BaseAgent


class Cut(BaseAgent):
    def setup(self):
        self.socket = zmq.Context().socket(zmq.REP)
        self.socket.bind("tcp://*:7311"

    def answer(self):
        return {"status": "ok"}
