class BaseAgent:
    def __init__(self, config=None):
        self.config = config or {}

    def health(self):
        return True

    def run(self):
        """The lifecycle: sockets, threads and health are its business."""
        import threading

        import zmq

        self.socket = zmq.Context().socket(zmq.REP)
        self.socket.bind("tcp://*:7000")
        threading.Thread(target=self.health).start()
