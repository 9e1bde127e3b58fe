"""The options of verbs that have many. Imports nothing that a verb needs only when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from interlock.broker.config import BUILT_IN, STRATEGY_OF

STEERING = {
    "approve": "let the next stage of an agent's migration begin",
    "pause": "let an agent's migration stand as it is for a while",
    "resume": "let an agent's migration go on that is paused or held",
    "hold": "stop an agent's migration where it is, until somebody has looked",
    "abort": "end an agent's migration, and put the old revision back",
    "commit": "end the observation of an agent's migration now, and make its revision permanent",
}


def whole_number(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def migrate_options(one: argparse.ArgumentParser) -> None:
    """Of migrate and plan."""
    one.add_argument("agent", metavar="AGENT")
    one.add_argument("--to", required=True, metavar="REVISION")
    chosen = one.add_mutually_exclusive_group()
    chosen.add_argument("--strategy", choices=list(BUILT_IN), help="instead of the one that is due")
    chosen.add_argument("--level", choices=list(STRATEGY_OF), help="the same, by the level of risk it is for")
    one.add_argument(
        "--because", default="", metavar="TEXT", help="why with less care than is due, or in a freeze; it is recorded"
    )


def steer_options(one: argparse.ArgumentParser, name: str) -> None:
    """Of the verbs in STEERING."""
    one.add_argument("agent", metavar="AGENT")
    why = "needed as long as the observation has not passed; it is recorded" if name == "commit" else "for the record"
    one.add_argument("--because", default="", metavar="TEXT", help=why)


def log_options(log: argparse.ArgumentParser) -> None:
    log.add_argument(
        "act", nargs="?", choices=["list", "follow", "export", "verify"], default="list",
        help="list: the newest; follow: all and what comes; export: all as JSON lines; verify: its hash chain",
    )  # fmt: skip
    log.add_argument("--file", type=Path, metavar="PATH", help="a log file instead of the fleet's broker; only read")
    log.add_argument("--topic", action="append", default=[], metavar="PREFIX", help="only topics that start with it")
    log.add_argument("--type", action="append", default=[], metavar="NAME", help="only this type, such as rolled-back")
    log.add_argument("--agent", default="", metavar="AGENT", help="only what concerns this agent")
    log.add_argument("--since", metavar="TIME", help="logged since: 10m (ago), 2026-01-31T12:00, seconds since 1970")
    log.add_argument("--until", metavar="TIME", help="logged until")
    log.add_argument("--after", type=whole_number, default=0, metavar="N", help="only numbers above N")
    log.add_argument("--limit", type=whole_number, metavar="N", help="list: at most so many, the newest (default 50)")
    log.add_argument("--expect", default="", metavar="N:HASH", help="verify: a head that was printed earlier")


def keys_options(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, help: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=help, description=help, parents=[common])

    action("init", "make the authority, and keys for everybody whom the fleet file names")
    issue = action("issue", "keys for one more: broker, coordinator, rules, host, monitor, operator or subscriber")
    issue.add_argument("role", metavar="ROLE")
    issue.add_argument("name", metavar="NAME", nargs="?", default="")
    issue.add_argument("--topic", action="append", default=[], metavar="PREFIX", help="what a subscriber may hear")
    action("list", "everybody who belongs, or did")
    revoke = action("revoke", "end the keys of one: at once, on open connections too")
    rotate = action("rotate", "new keys for one; the old ones end at once")
    for one in (revoke, rotate):
        one.add_argument("identity", metavar="NAME", help="for example host/alpha, or alpha if only one is called so")
    for one in (issue, rotate):
        one.add_argument("--out", type=Path, metavar="FILE", help="an enrolment file to carry to where it runs")
    install = action("install", "take over an enrolment file that was made where the authority is")
    install.add_argument("file", type=Path, metavar="FILE")
