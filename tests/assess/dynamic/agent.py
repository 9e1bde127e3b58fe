import importlib
import sys

LIBRARY = "zmq"
Base = importlib.import_module("base").BaseAgent


class Late(Base):
    def setup(self, plugin):
        zmq = importlib.import_module(LIBRARY)
        self.socket = zmq.Context().socket(zmq.REP)
        self.store = __import__("sqlite3").connect(":memory:")
        self.worker = getattr(importlib.import_module("threading"), "Thread")(target=print)
        import yaml

        read = getattr(sys.modules["yaml"], "safe_load")
        self.settings = read(open("late.yaml"))
        self.plugin = importlib.import_module(plugin)
