"""Revision 1: reads through every topic for every question."""

import corpus
import tutor


class Scanning(tutor.Tutor):
    def prepare(self) -> None:
        self.texts = {topic: " " + "  ".join(corpus.words(text)) + " " for topic, text in corpus.TOPICS.items()}
        self.sizes = {topic: len(text.split()) for topic, text in self.texts.items()}

    def rank(self, looked_for: list[str]) -> dict[str, int]:
        scores: dict[str, int] = {}
        for word in looked_for:
            counts = {topic: text.count(f" {word} ") for topic, text in self.texts.items()}
            found = {topic: count for topic, count in counts.items() if count}
            for topic, count in found.items():
                scores[topic] = scores.get(topic, 0) + corpus.score(count, len(found), self.sizes[topic])
        return scores
