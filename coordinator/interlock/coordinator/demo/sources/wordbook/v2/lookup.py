"""Version 2 made up its mind beforehand."""

from pydoc_data.topics import topics

DEFINITIONS = {name: " ".join(text.split("\n\n")[1].split()) for name, text in topics.items()}


def define(word):
    return DEFINITIONS.get(word.lower())
