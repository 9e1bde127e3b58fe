import sqlite3
import threading

from base import BaseAgent


def shared():
    return sqlite3.connect(":memory:")


class First(BaseAgent):
    def setup(self):
        self.worker = threading.Thread(target=print)


class Second(BaseAgent):
    def setup(self):
        self.kept = shared()


if __name__ == "__main__":
    First().setup()
    Second().setup()
