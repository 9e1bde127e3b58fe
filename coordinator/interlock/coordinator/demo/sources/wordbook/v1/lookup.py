"""Version 1 looks through the topics for each word."""

from pydoc_data.topics import topics


def define(word):
    for name in sorted(topics):
        if name == word.lower():
            return " ".join(topics[name].split("\n\n")[1].split())
    return None
