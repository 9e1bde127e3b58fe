import sqlite3

from base import BaseAgent


class Keeper(BaseAgent):
    def setup(self):
        self.store = sqlite3.connect("memory.db")

    def keep(self, text):
        try:
            self.store.execute("INSERT INTO kept VALUES (?)", (text,))
        except sqlite3.OperationalError as error:
            raise sqlite3.DatabaseError("lost") from error
