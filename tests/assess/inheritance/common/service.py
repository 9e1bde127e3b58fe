import redis

from framework.base import BaseAgent


class ServiceAgent(BaseAgent):
    def setup(self):
        self.cache = redis.Redis(host="127.0.0.1", port=6379)
