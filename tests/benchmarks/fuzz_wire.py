"""Coverage-guided fuzzing (atheris) of everything that decodes what a stranger or a peer sends.

Each target runs in a process of its own, for its share of the time, from a corpus of valid messages, under a limit of
its memory; the state behind a target (the plane, what it remembers) lives for the whole run, so that what grows without
end is found too. Prints one JSON object; exits 1 if an input crashed, hung or took too much memory, and keeps it.
Run: make fuzz SECONDS=60, or python tests/benchmarks/fuzz_wire.py [--seconds 60] [--targets zap,http] [--folder DIR]
An input that was kept is tried again with: python tests/benchmarks/fuzz_wire.py --again FILE --targets TARGET
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trio

try:
    import atheris
except ImportError:
    sys.exit(
        "make fuzz needs atheris, a fuzzer with libFuzzer inside: pip install -c constraints.txt -e '.[fuzz]'\n"
        "(it has wheels for CPython on Linux x86-64; elsewhere it is built with clang)"
    )

with atheris.instrument_imports(include=["interlock", "h11"]):
    from fuzz_targets import SEPARATOR, TARGETS, Frames, mutate

RSS_LIMIT_MB = 1024  # of one target's process; at rest it has some 65, and remembered telemetry is bounded
INPUT_S = 10  # an input that takes longer hangs
MAX_INPUT = 1 << 16  # bytes; what is larger is refused by its length, which other tests show


# --- one target's process


def one_target(name: str, options: list[str]) -> None:
    """Never returns: libFuzzer ends the process."""
    logging.disable(logging.CRITICAL)

    async def fuzz() -> None:
        target = TARGETS[name]()
        atheris.Setup(
            [sys.argv[0], *options],
            lambda data: target.take(data.split(SEPARATOR)),
            custom_mutator=lambda data, most, seed: mutate(data, most, seed, atheris.Mutate),
        )
        atheris.Fuzz()

    trio.run(fuzz)  # gates and planes ask for its time


# --- all of them


def run_target(name: str, folder: Path, seconds: int, again: Path | None) -> dict[str, Any]:
    corpus, found = folder / name / "corpus", folder / name / "found"
    for made in (corpus, found):
        made.mkdir(parents=True, exist_ok=True)
    words = folder / name / "words"
    seeds = trio.run(_seeds, name)
    for number, frames in enumerate(seeds):
        (corpus / f"seed-{number:03}").write_bytes(SEPARATOR.join(frames))
    words.write_text("\n".join(_dictionary(seeds)) + "\n")
    options = [f"-rss_limit_mb={RSS_LIMIT_MB}", f"-timeout={INPUT_S}", f"-artifact_prefix={found}/"]
    if again is not None:
        options.append(str(again))
    else:
        options += [f"-max_total_time={seconds}", f"-max_len={MAX_INPUT}", f"-dict={words}", "-print_final_stats=1"]
        options += ["-len_control=20", str(corpus)]
    began = time.monotonic()
    command = [sys.executable, __file__, "--one", name, *options]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    text = done.stderr
    kept = sorted(str(path) for path in found.iterdir())
    if done.returncode:
        print(text[-6000:], file=sys.stderr)
    return {
        "target": name,
        "executions": _figure(r"stat::number_of_executed_units:\s+(\d+)", text),
        "executions_per_s": _figure(r"stat::average_exec_per_sec:\s+(\d+)", text),
        "edges": _figure(r"cov: (\d+)", text),
        "features": _figure(r"ft: (\d+)", text),
        "inputs_kept": _figure(r"corp: (\d+)", text),
        "peak_rss_mb": _figure(r"stat::peak_rss_mb:\s+(\d+)", text),
        "seconds": round(time.monotonic() - began, 1),
        "crashes": kept,
        "failed": bool(done.returncode or kept),
    }


async def _seeds(name: str) -> list[Frames]:
    return list(TARGETS[name]().seeds())


def _figure(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    return int(found[-1]) if found else 0


def _dictionary(seeds: list[Frames]) -> Iterator[str]:
    """Words of the seeds, and the values that decoders stumble over, as libFuzzer reads them."""
    words = {word for frames in seeds for frame in frames for word in re.findall(rb"[A-Za-z_/-]{2,24}", frame)}
    words |= {
        SEPARATOR,
        b"\xc0",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
    }
    words |= {b"\xcf" + b"\xff" * 8, b"\xd3\x80" + b"\0" * 7, b"\xcb\x7f\xf8" + b"\0" * 6, b"\xcb\x7f\xf0" + b"\0" * 6}
    words |= {b"\xd6\xff\0\0\0\0", b"\xc7\x01\x05a", b"\xa2\xff\xfe", b"\x91" * 64}
    for word in sorted(words):
        yield '"' + "".join(f"\\x{byte:02x}" for byte in word) + '"'


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60, help="for all targets together")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--folder", type=Path, help="where corpus and findings stay; without it only findings do")
    parser.add_argument("--again", type=Path, help="an input that was kept: try only this one")
    arguments = parser.parse_args()
    names = arguments.targets.split(",")
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="interlock-fuzz-"))
    share = max(1, arguments.seconds // len(names))
    results = [run_target(name, folder, share, arguments.again) for name in names]
    failed = [result["target"] for result in results if result.pop("failed")]
    print(
        json.dumps(
            {
                "bench": "fuzz",
                "python": platform.python_version(),
                "cores": os.cpu_count(),
                "rss_limit_mb": RSS_LIMIT_MB,
                "folder": str(folder),
                "targets": results,
            },
            indent=2,
        )
    )
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one_target(sys.argv[2], sys.argv[3:])
    sys.exit(main())
