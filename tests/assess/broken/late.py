from base import BaseAgent


class Late(BaseAgent):
    pass


return Late
