"""Clients as they are: plain ZeroMQ REQ sockets that know nothing of Interlock. Each asks, checks the answer against
its own idea of what is right, waits for its turn, and asks again.

    ask.py WHAT ENDPOINT CLIENTS RATE

Prints one JSON line a tenth of a second: [[client, sent, answered, right, revision], ...], times in seconds since 1970.
"""

import json
import math
import re
import signal
import sys
import time
from collections import Counter
from pydoc_data.topics import topics

import zmq

GIVE_UP_S = 15  # a client that waits longer counts its request as failed
REPORT_S = 0.1

QUESTIONS = [
    "How does the with statement work?",
    "What is a context manager?",
    "When is the else clause of a loop executed?",
    "How do I raise an exception from another exception?",
    "What does the yield expression return?",
    "How are default parameter values evaluated?",
    "What is the difference between is and ==?",
    "How can I format a floating point number?",
    "What is a metaclass?",
    "How does attribute access work with descriptors?",
    "What does global mean in a function?",
    "How are slices written?",
    "Which operators have the highest precedence?",
    "How does pattern matching with case blocks work?",
    "What is the exponent of an imaginary literal?",
    "How is a module imported from a package?",
    "What does assert do when debug is off?",
    "How are lambda expressions evaluated?",
    "What do bitwise shift operations raise?",
    "How do coroutines await other coroutines?",
    "How is a string literal prefixed?",
    "How does the debugger set a breakpoint?",
    "What are mutable sequence types?",
    "How do I delete an item from a mapping?",
]
STOP = {"a", "an", "and", "are", "as", "be", "by", "can", "do", "does", "for", "from", "how", "i", "in", "is", "it"} | {
    "my", "of", "on", "or", "the", "to", "what", "when", "which", "why"
}  # fmt: skip


def words(text):
    return re.findall(r"[a-z_]+", text.lower())


def expected_topics(question):
    """What a right answer names, worked out the long way."""
    counts = {topic: Counter(words(text)) for topic, text in topics.items()}
    points = Counter()
    for word in dict.fromkeys(w for w in words(question) if w not in STOP):
        having = [topic for topic in counts if counts[topic][word]]
        for topic in having:
            size = sum(counts[topic].values())
            points[topic] += counts[topic][word] * (1_000_000 // len(having)) // (200 + size)
    return [[topic, points[topic]] for topic in sorted(points, key=lambda t: (-points[t], t))[:3]]


def tutor_requests():
    for question in QUESTIONS:
        yield {"action": "ask", "question": question}, expected_topics(question)


def wordbook_requests():
    for name in sorted(topics)[::3]:
        yield {"action": "define", "word": name}, " ".join(topics[name].split("\n\n")[1].split())


def is_right(answer, expected):
    if answer.get("status") != "ok":
        return False
    if "answers" in answer:
        return [[found["topic"], found["score"]] for found in answer["answers"]] == expected
    return answer.get("definition") == expected


class Client:
    def __init__(self, number, context, endpoint, poller):
        self.number, self.context, self.endpoint, self.poller = number, context, endpoint, poller
        self.sent = None
        self.open()

    def open(self):
        self.socket = self.context.socket(zmq.REQ)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(self.endpoint)
        self.poller.register(self.socket, zmq.POLLIN)

    def ask(self, request, expected):
        self.expected = expected
        self.sent = time.time()
        self.socket.send(json.dumps(request).encode())

    def take(self):
        """The record of the request that is answered now."""
        try:
            answer = json.loads(self.socket.recv())
        except ValueError:
            answer = {}
        record = [self.number, self.sent, time.time(), is_right(answer, self.expected), answer.get("revision", "")]
        self.sent = None
        return record

    def give_up(self):
        record = [self.number, self.sent, time.time(), False, ""]
        self.poller.unregister(self.socket)
        self.socket.close()
        self.open()
        self.sent = None
        return record


def main():
    what, endpoint, clients, rate = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests = list({"tutor": tutor_requests, "wordbook": wordbook_requests}[what]())
    context, poller = zmq.Context(), zmq.Poller()
    all_clients = [Client(number, context, endpoint, poller) for number in range(clients)]
    by_socket = {client.socket: client for client in all_clients}
    period = clients / rate
    start = time.monotonic()
    due = [start + period * number / clients for number in range(clients)]
    records, asked, report_at = [], 0, start + REPORT_S
    while not stop:
        now = time.monotonic()
        for client in all_clients:
            if client.sent is None and due[client.number] <= now:
                client.ask(*requests[asked % len(requests)])
                asked += 1
                due[client.number] = max(due[client.number] + period, now)
            elif client.sent is not None and time.time() - client.sent > GIVE_UP_S:
                records.append(client.give_up())
                by_socket[client.socket] = client
        waits = [due[client.number] for client in all_clients if client.sent is None]
        wait = min([report_at, *waits]) - time.monotonic()
        for socket, _ in poller.poll(max(0, math.ceil(wait * 1000))):
            records.append(by_socket[socket].take())
        if time.monotonic() >= report_at:
            print(json.dumps(records), flush=True)
            records = []
            report_at += REPORT_S
    print(json.dumps(records), flush=True)
    context.destroy(linger=0)


if __name__ == "__main__":
    main()
