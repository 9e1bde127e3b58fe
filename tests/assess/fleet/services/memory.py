import zmq


class Memory:
    def __init__(self, port=7201):
        self.port = port
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.REP)

    def run(self):
        self.socket.bind(f"tcp://*:{self.port}")
        while True:
            self.socket.send(self.socket.recv())


def main():
    Memory().run()


if __name__ == "__main__":
    main()
