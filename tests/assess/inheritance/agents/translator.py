from agents.tools import begin
from common.networked import NetworkedService


class Translator(NetworkedService):
    def setup(self):
        super().setup()
        self.worker = begin(self.translate)

    def translate(self):
        return "hello"
