from base import BaseAgent
from half import value


class User(BaseAgent):
    def get(self):
        return value
