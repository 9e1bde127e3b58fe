from base import BaseAgent


class Doctor(BaseAgent):
    def handle(self, request):
        if request["action"] == "health":
            return {"status": "ok"}
        match request["action"]:
            case "health_check":
                return {"status": "ok"}
        return {}

    def _health_check_loop(self):
        while True:
            self.handle({"action": "ping"})

    def routes(self, app):
        @app.get("/healthz")
        def answer():
            return "ok"
