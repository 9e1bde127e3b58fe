from base import BaseAgent


class Plain(BaseAgent):
    def health(self):
        return self.config.get("ready", True)

    def greet(self, name):
        return {"text": f"Hello, {name}!"}
