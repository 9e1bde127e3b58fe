"""Revision 2: looks the words up in an inverted index. Same answers, faster."""

from collections import Counter, defaultdict

import corpus
import tutor


class Indexed(tutor.Tutor):
    def prepare(self) -> None:
        self.index: dict[str, dict[str, int]] = defaultdict(dict)
        self.sizes: dict[str, int] = {}
        for topic, text in corpus.TOPICS.items():
            found = corpus.words(text)
            self.sizes[topic] = len(found)
            for word, count in Counter(found).items():
                self.index[word][topic] = count

    def rank(self, looked_for: list[str]) -> dict[str, int]:
        scores: dict[str, int] = {}
        for word in looked_for:
            found = self.index.get(word, {})
            for topic, count in found.items():
                scores[topic] = scores.get(topic, 0) + corpus.score(count, len(found), self.sizes[topic])
        return scores
