"""Revision 4: dies under load, as native code does."""

import os

import r2

QUESTIONS = 260  # after so many: past the shadow comparison, under live load


class Crashing(r2.Indexed):
    def rank(self, looked_for: list[str]) -> dict[str, int]:
        if self.asked > QUESTIONS:
            os.abort()
        return super().rank(looked_for)
