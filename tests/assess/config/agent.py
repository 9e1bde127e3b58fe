import json
from pathlib import Path

import yaml

from base import BaseAgent


class Reader(BaseAgent):
    def setup(self):
        with open("config/agent.yaml") as file:
            self.settings = yaml.safe_load(file)
        self.more = json.loads(Path("config/more_config.json").read_text())

    def take(self, message):
        return json.loads(message)
