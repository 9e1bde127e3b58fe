"""Who depends on whom, which ports clash, and which agents go round in circles. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import msgspec

_PORT = re.compile(r"^[a-z][a-z0-9+.-]*://(?:[^/@]*@)?(?:\[[^\]]*\]|[^:/]*):(\d{1,5})(?:/|$)", re.IGNORECASE)


class Clash(msgspec.Struct, frozen=True):
    """A port that several agents bind, with the agents."""

    port: int
    agents: list[str]


class Graph(msgspec.Struct, frozen=True):
    """Edges lead from an agent to what it needs."""

    edges: list[tuple[str, str]]
    clashes: list[Clash]
    cycles: list[list[str]]


def neighbours(edges: Iterable[tuple[str, str]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """By agent: what it needs, and what needs it."""
    needs: dict[str, list[str]] = {}
    needed_by: dict[str, list[str]] = {}
    for one, other in edges:
        needs.setdefault(one, []).append(other)
        needed_by.setdefault(other, []).append(one)
    return needs, needed_by


def port_of(endpoint: str) -> int:
    """0 if it has none, or one that the source does not tell."""
    found = _PORT.match(endpoint)
    return int(found[1]) if found is not None and 0 < int(found[1]) < 65_536 else 0


def connect(
    binds: Mapping[str, Sequence[str]], connects: Mapping[str, Sequence[str]], declared: Mapping[str, Sequence[str]]
) -> Graph:
    """By agent: endpoints that it binds, endpoints that it connects to, and the names that a start-up list says."""
    by_place: dict[int | str, list[str]] = {}
    for name, endpoints in binds.items():
        for place in dict.fromkeys(map(_place, endpoints)):
            if place:
                by_place.setdefault(place, []).append(name)
    edges: dict[tuple[str, str], None] = {}
    for name, endpoints in connects.items():
        for endpoint in endpoints:
            for other in by_place.get(_place(endpoint), ()):
                if other != name:
                    edges[name, other] = None
    folded = {name.casefold(): name for name in binds}
    for name, others in declared.items():
        for said in others:
            found = said if said in binds else folded.get(said.casefold())
            if found is not None and found != name:
                edges[name, found] = None
    clashes = [Clash(place, names) for place, names in by_place.items() if isinstance(place, int) and len(names) > 1]
    return Graph(sorted(edges), sorted(clashes, key=lambda clash: clash.port), cycles(edges))


def _place(endpoint: str) -> int | str:
    """What two endpoints have in common if one reaches the other: the port, or the whole of what has none."""
    port = port_of(endpoint)
    if port:
        return port
    return endpoint if endpoint.startswith(("ipc://", "inproc://")) and "{" not in endpoint else ""


def cycles(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The strongly connected groups of more than one agent (Tarjan, without recursion)."""
    after: dict[str, list[str]] = {}
    for one, other in edges:
        after.setdefault(one, []).append(other)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    open_: list[str] = []
    found: list[list[str]] = []
    for start in list(after):
        if start in index:
            continue
        work = [(start, iter(after[start]))]
        index[start] = low[start] = len(index)
        open_.append(start)
        while work:
            name, rest = work[-1]
            other = next(rest, "")
            if not other:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[name])
                if low[name] == index[name]:
                    at = open_.index(name)
                    if len(open_) - at > 1:
                        found.append(sorted(open_[at:]))
                    del open_[at:]
            elif other not in index:
                index[other] = low[other] = len(index)
                open_.append(other)
                work.append((other, iter(after.get(other, ()))))
            elif other in open_:
                low[name] = min(low[name], index[other])
    return sorted(found)
