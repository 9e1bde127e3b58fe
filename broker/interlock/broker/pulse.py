"""What a role says of itself twice a second: that it is up, and what its links to the telemetry plane lost."""

from __future__ import annotations

import time

import trio

from interlock.broker.bus import SampleFeed, TelemetryPublisher
from interlock.broker.samples import Labels, labels

PULSE_S = 0.5  # a role without four of them is not heard: 2 s


class Pulse:
    """Sent by the first publisher of a role, so under a topic that is its own; a role without one has no pulse."""

    def __init__(self, source: str) -> None:
        role, _, name = source.partition("/")
        self._role, self._name, self._source = role, name, source
        self._said: set[Labels] = set()
        self.publishers: list[TelemetryPublisher] = []
        self.feeds: list[SampleFeed] = []

    async def run(self) -> None:
        while True:
            self.say()
            await trio.sleep(PULSE_S)

    def say(self) -> None:
        if self.publishers:
            figures = self._figures(self.publishers[0].host)
            gone = list(self._said - figures.keys())
            self._said = set(figures)
            self.publishers[0].send(figures, time=time.time(), ended=gone)

    def end(self) -> None:
        if self._said:
            self.publishers[0].send({}, time=time.time(), ended=list(self._said))
            self._said = set()

    def _figures(self, host: str) -> dict[Labels, float]:
        # of a role that runs in several processes under one identity, each has a publisher of its own name
        name = self._name or self.publishers[0].publisher
        whose = self._source if self._name else name
        found = {labels("role_up", host=host, role=self._role, name=name): 1.0}
        dropped = sum(publisher.dropped for publisher in self.publishers)
        found[labels("bus_dropped_total", host=host, link=f"{whose} publisher")] = float(dropped)
        for feed in self.feeds:
            link = feed.name.replace(self._source, whose, 1)
            found[labels("bus_link_up", host=host, link=link)] = float(not feed.lost)
            found[labels("bus_dropped_total", host=host, link=link)] = float(feed.dropped)
            for source, count in feed.losses.items():
                found[labels("bus_lost_total", host=host, link=link, source=source)] = float(count)
        return found
