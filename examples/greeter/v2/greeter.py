"""The next revision: it can greet loudly. Clients of the first one need not change."""

from interlock.agents.agent import Agent, handler


class Greeter(Agent):
    @handler("greet", idempotent=True)
    async def greet(self, name: str, loud: bool = False) -> dict[str, str]:
        self.metrics.counter("greetings").add()
        text = f"{self.config['greeting']}, {name}!"
        return {"text": text.upper() if loud else text}
