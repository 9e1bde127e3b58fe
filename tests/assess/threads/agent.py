import concurrent.futures
import subprocess
import threading

from base import BaseAgent


class Watcher(threading.Thread):
    pass


class Busy(BaseAgent):
    def start(self):
        self.worker = threading.Thread(target=self.work, daemon=True)
        self.pool = concurrent.futures.ThreadPoolExecutor(2)
        subprocess.run(["true"], check=True)

    def work(self):
        pass
