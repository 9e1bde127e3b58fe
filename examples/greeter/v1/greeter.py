"""The smallest agent that does something: one handler, one number, one setting."""

from interlock.agents.agent import Agent, handler


class Greeter(Agent):
    @handler("greet", idempotent=True)
    async def greet(self, name: str) -> dict[str, str]:
        self.metrics.counter("greetings").add()
        return {"text": f"{self.config['greeting']}, {name}!"}
