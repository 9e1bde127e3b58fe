"""What the tutor knows: the topics of Python's own documentation, and how well a topic fits a question.

A topic's score is the sum over the question's words of how rare the word is and how dense it stands in the topic, in
whole numbers, so that two implementations agree to the last digit.
"""

from __future__ import annotations

import re
from pydoc_data.topics import topics as TOPICS

STOP = {"a", "an", "and", "are", "as", "be", "by", "can", "do", "does", "for", "from", "how", "i", "in", "is", "it"} | {
    "my", "of", "on", "or", "the", "to", "what", "when", "which", "why"
}  # fmt: skip


def words(text: str) -> list[str]:
    return re.findall(r"[a-z_]+", text.lower())


def terms(question: str) -> list[str]:
    """The words that matter, each once, in order."""
    return list(dict.fromkeys(word for word in words(question) if word not in STOP))


def score(count: int, topics_with_it: int, topic_words: int) -> int:
    """One word's part of a topic's score."""
    return count * (1_000_000 // topics_with_it) // (200 + topic_words)


def excerpt(topic: str, looked_for: list[str]) -> str:
    """The first paragraph of the topic that has one of the words."""
    for paragraph in TOPICS[topic].split("\n\n"):
        if set(looked_for) & set(words(paragraph)):
            return " ".join(paragraph.split())[:300]
    return ""
