"""`python -m interlock.coordinator.assess.worker ROOT LIMIT`: reads source files, one after another, for the verb.

A process of its own: source that ends Python's parser ends only this. Each question is one line of JSON on standard
input, each answer its length and MessagePack on standard output. It ends when standard input does.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import msgspec

from interlock.coordinator.assess.model import Module, Problem
from interlock.coordinator.assess.reading import compiles, read

COLLECT = 200  # files: what hangs together all the same is little


class Question(msgspec.Struct, frozen=True):
    """compile: whether a file that parses compiles too, instead of all that it says."""

    path: str
    compile: bool = False


class Answer(msgspec.Struct, frozen=True):
    """unread: why the file can't be read at all."""

    module: Module | None = None
    problem: Problem | None = None
    unread: str = ""


def answer(root: Path, question: Question, limit: int) -> Answer:
    try:
        with (root / question.path).open("rb") as file:
            raw = file.read(limit + 1)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        return Answer(unread=error.strerror or "can't be read")
    if question.compile:
        return Answer(problem=compiles(raw, question.path))
    module = read(raw, question.path, limit=limit)
    module.size = max(module.size, size)
    return Answer(module=module)


def main(root: Path, limit: int) -> None:
    asked, told = sys.stdin.buffer, sys.stdout.buffer
    gc.disable()  # trees hold no circles, and looking through them for some takes a third of the time
    for number, line in enumerate(asked, 1):
        if number % COLLECT == 0:
            gc.collect()
        body = msgspec.msgpack.encode(answer(root, msgspec.json.decode(line, type=Question), limit))
        told.write(len(body).to_bytes(4, "big") + body)
        told.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
