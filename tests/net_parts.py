"""Network namespaces as machines: one cable from each to a common switch, and cuts between any two, one way or both."""

from __future__ import annotations

import os
import shutil
import subprocess
from types import TracebackType

WAYS = ("both", "out", "in")  # what is cut, seen from the first of two machines


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10)


def why_not() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if not shutil.which("ip") or not shutil.which("ss"):
        return "iproute2 is not installed"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"il-probe-{os.getpid()}"
    try:
        ip("netns", "add", probe)
        try:
            ip("-n", probe, "link", "add", "probe", "type", "bridge")
        finally:
            ip("netns", "delete", probe)
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.decode().strip()}"
    return ""


class Net:
    """Machines by name, each with its address in one /24. Nothing of it is left after `with`."""

    def __init__(self, machines: dict[str, str]) -> None:
        self.machines = machines
        self._switch = f"il-switch-{os.getpid()}"
        self._cuts: list[tuple[str, str]] = []

    def space(self, name: str) -> str:
        return f"il-{name}-{os.getpid()}"

    def within(self, name: str) -> list[str]:
        """What stands before a command that is to run on this machine."""
        return ["ip", "netns", "exec", self.space(name)]

    def __enter__(self) -> Net:
        try:
            ip("netns", "add", self._switch)
            ip("-n", self._switch, "link", "add", "switch", "type", "bridge", "forward_delay", "0")
            ip("-n", self._switch, "link", "set", "switch", "up")
            for number, (name, address) in enumerate(self.machines.items()):
                space, port = self.space(name), f"port{number}"
                ip("netns", "add", space)
                ip("-n", space, "link", "set", "lo", "up")
                ip("-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", "cable", "netns", space)
                ip("-n", self._switch, "link", "set", port, "master", "switch", "up")
                ip("-n", space, "address", "add", f"{address}/24", "dev", "cable")
                ip("-n", space, "link", "set", "cable", "up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for space in (self._switch, *map(self.space, self.machines)):
            subprocess.run(["ip", "netns", "delete", space], check=False, capture_output=True, timeout=10)

    def cut(self, one: str, other: str, way: str = "both") -> None:
        """ "out": what `one` sends does not reach `other`; "in": the other way round."""
        for sender, receiver in {"both": [(one, other), (other, one)], "out": [(one, other)], "in": [(other, one)]}[
            way
        ]:
            ip("-n", self.space(sender), "route", "add", "blackhole", f"{self.machines[receiver]}/32")
            self._cuts.append((sender, receiver))

    def heal(self) -> None:
        """All that was cut."""
        while self._cuts:
            sender, receiver = self._cuts.pop()
            ip("-n", self.space(sender), "route", "delete", "blackhole", f"{self.machines[receiver]}/32")
