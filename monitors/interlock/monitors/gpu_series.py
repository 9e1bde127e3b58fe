"""From a card's readings to its series. Pure. A series' key is made once: a sample of ten cards has hundreds."""

from __future__ import annotations

from collections.abc import Mapping

from interlock.broker.samples import Labels, labels
from interlock.monitors import gpu_metrics as gm
from interlock.monitors import series
from interlock.monitors.gpu import Card, Reading
from interlock.monitors.gpu_faults import Cause
from interlock.monitors.roster import Instance
from interlock.monitors.sampler import Group

Samples = dict[Labels, float]

_Scope = tuple[frozenset[Group], bool]


class CardSeries:
    """The series of one card: which report, and how often it was read."""

    def __init__(self, host: str, card: Card) -> None:
        self.card = card
        self.up = False
        self._host = host
        self._labels = {"host": host, "gpu": str(card.index), "uuid": card.uuid}
        self._keys: dict[str, Labels] = {}
        self._scopes: dict[_Scope, tuple[str, ...]] = {}  # the readings of the last sample of each scope
        self._processes: set[Labels] = set()
        self._lacking: Mapping[str, str] = {}
        self._lacking_live: set[Labels] = set()
        self._told: set[Labels] = set()  # of the monitor's own series
        self._samples = 0

    @property
    def live(self) -> set[Labels]:
        read = {self._key(reading) for readings in self._scopes.values() for reading in readings}
        return read | self._processes | self._lacking_live | self._told

    def news_of(self, lacking: Mapping[str, str]) -> bool:
        return lacking != self._lacking

    def take(self, reading: Reading, owners: Mapping[int, Instance], samples: Samples) -> list[Labels]:
        """Add the reading's samples; the series that ended since the last one of the same scope."""
        self.up = True
        self._samples += 1
        count = len(reading.values)
        own = {gm.UP: 1.0, gm.SAMPLES: float(self._samples)}
        own[gm.QUALITY] = count / (count + reading.missing) if count else 0.0
        if Group.CALM in reading.groups:
            own[gm.SAMPLE_SECONDS] = reading.seconds
        self._tell(own, samples)
        keys = self._keys
        for name, value in reading.values.items():
            samples[keys.get(name) or self._key(name)] = value
        ended = self._ended(reading)
        if reading.processes is not None and Group.CALM in reading.groups:
            ended += self._take_processes(reading, owners, samples)
        if reading.lacking is not None and (reading.slow or reading.lacking != self._lacking):
            ended += self._take_lacking(reading.lacking, samples)
        return ended

    def fail(self, samples: Samples) -> list[Labels]:
        """It does not answer: its readings end, and that is what is published of it."""
        self.up = False
        self._tell({gm.UP: 0.0, gm.QUALITY: 0.0}, samples)
        if not self._scopes and not self._processes:
            return []
        ended = [self._key(name) for names in self._scopes.values() for name in names]
        ended += [*self._processes, self._key(gm.SAMPLE_SECONDS)]
        self._scopes = {}
        self._processes = set()
        return list(dict.fromkeys(ended))

    def end(self) -> list[Labels]:
        """Nothing is published of it any more."""
        ended = list(self.live)
        self._scopes = {}
        self._processes, self._lacking_live, self._told = set(), set(), set()
        self._lacking = {}
        self.up = False
        return ended

    def count_xids(self, xids: Mapping[tuple[int, Cause], int], samples: Samples) -> None:
        """The counters of XIDs, from 0 on, so that the first one is an increase."""
        causes: tuple[Cause, ...] = ("device", "agent")
        self._tell({f"{gm.XIDS} cause={cause}": xids.get((self.card.index, cause), 0) for cause in causes}, samples)

    # --- inside

    def _key(self, reading: str) -> Labels:
        key = self._keys.get(reading)
        if key is None:
            name, more = gm.split(reading)
            key = self._keys[reading] = labels(name, **self._labels, **more)
        return key

    def _tell(self, values: Mapping[str, float], samples: Samples) -> None:
        for name, value in values.items():
            key = self._key(name)
            samples[key] = value
            self._told.add(key)

    def _ended(self, reading: Reading) -> list[Labels]:
        scope = (reading.groups, reading.slow)
        names = tuple(reading.values)
        if self._scopes.get(scope) == names:
            return []
        known = {name for each in self._scopes.values() for name in each}
        if reading.missing:  # what failed for once is a hole, and no end
            self._scopes[scope] = tuple(known.union(names))
            return []
        self._scopes[scope] = names
        here = {"hot": Group.HOT in reading.groups, "calm": Group.CALM in reading.groups, "slow": reading.slow}
        gone = {name for name in known.difference(names) if here[gm.METRICS[gm.split(name)[0]].tier]}
        self._scopes = {of: tuple(name for name in each if name not in gone) for of, each in self._scopes.items()}
        return [self._key(name) for name in gone]

    def _take_processes(self, reading: Reading, owners: Mapping[int, Instance], samples: Samples) -> list[Labels]:
        used = {name: value for name, value in reading.values.items() if name == gm.MEMORY_USED}
        told = Reading(reading.card, reading.time, used, reading.processes, lacking=reading.lacking)
        found = series.of_card(self._host, told, owners)
        for name in (gm.UP, gm.MEMORY_USED):  # the card's own
            found.pop(self._key(name), None)
        for pid, share in reading.shares.items():
            if (owner := owners.get(pid)) is not None:
                of = {"agent": owner.agent, "revision": owner.revision, "role": owner.role}
                key = labels(gm.PROCESS_UTILIZATION, **self._labels, **of)
                found[key] = min(1.0, found.get(key, 0.0) + share)
        samples |= found
        ended = [key for key in self._processes if key not in found]
        self._processes = set(found)
        return ended

    def _take_lacking(self, lacking: Mapping[str, str], samples: Samples) -> list[Labels]:
        found = {
            labels(gm.LACKING, **self._labels, reading=reading.replace(" ", ","), reason=reason): 1.0
            for reading, reason in lacking.items()
        }
        samples |= found
        ended = [key for key in self._lacking_live if key not in found]
        self._lacking, self._lacking_live = lacking, set(found)
        return ended
