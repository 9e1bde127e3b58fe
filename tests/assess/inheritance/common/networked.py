import zmq

from .service import ServiceAgent


class NetworkedService(ServiceAgent):
    def setup(self):
        super().setup()
        self.context = zmq.Context()
        self.socket = self.open(zmq.ROUTER)

    def open(self, kind):
        return self.context.socket(kind)
