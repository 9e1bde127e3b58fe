"""Names over files: aliases, packages, star imports, and circles of all of these."""

from __future__ import annotations

import pytest

from interlock.coordinator.assess.project import Project, Roots, Spot
from interlock.coordinator.assess.reading import read


def project(**files: str) -> Project:
    """`pkg__mod="..."` is pkg/mod.py, `pkg____init__` its package file."""
    return Project([read(text.encode(), f"{name.replace('__', '/', 1)}.py") for name, text in files.items()])


def test_a_name_is_followed_through_packages_aliases_and_stars() -> None:
    tree = project(
        kit____init__="from .core import *\nfrom .core import Base as Ground\n",
        kit__core="class Base: ...\nclass Other(Base): ...\n",
        app="import kit\nfrom kit import Ground as G, core\nAlias = G\n",
    )
    for name in ("kit.Base", "kit.Ground", "kit.core.Base", ":G", ":Alias", ":core.Base"):
        assert tree.find(name, "app.py") == Spot("kit/core.py", "Base"), name
    assert tree.find(".core.Base", "kit/__init__.py") == Spot("kit/core.py", "Base")
    assert tree.find("numpy.array", "app.py") is None


def test_of_files_with_one_name_the_nearest_is_meant_and_the_library_is_left_in_peace() -> None:
    tree = project(a__net="class N: ...", b__net="class N: ...", a__app="import net", b__app="import net", a__socket="")
    assert tree.find("net.N", "a/app.py") == Spot("a/net.py", "N")
    assert tree.find("net.N", "b/app.py") == Spot("b/net.py", "N")
    assert tree.find("socket.socket", "b/app.py") is None
    assert tree.beside("socket", "a/app.py")
    assert not tree.beside("socket", "b/app.py")


def test_star_imports_that_go_round_in_circles_are_followed_once() -> None:
    count = 30
    stars = "\n".join(f"from m{n} import *" for n in range(count))
    tree = project(**{f"m{n}": stars for n in range(count)}, app="from m0 import *\n")
    assert tree.find("m0.nowhere", "app.py") == Spot("m0.py", "")


def test_aliases_and_bases_that_go_round_in_circles_end() -> None:
    tree = project(
        a="from b import X\nclass A(X): ...\nclass C(D): ...\nclass D(C): ...\n", b="from a import X\n",
    )  # fmt: skip
    roots = Roots(["Base"])
    assert tree.find("a.X", "b.py") is None
    assert tree.lineage(Spot("a.py", "A"), roots) is None
    assert tree.lineage(Spot("a.py", "C"), roots) is None
    assert {spot.name for spot in tree.ancestors(Spot("a.py", "C"))} == {"C", "D"}


@pytest.mark.parametrize(
    ("names", "name", "known"),
    [
        (["Agent"], ":Agent", True), (["Agent"], "pkg.mod.Agent", True), (["Agent"], "pkg.MyAgent", False),
        (["core.Base"], "pkg.core.Base", True), (["core.Base"], "..core.Base", True),
        (["core.Base"], "score.Base", False), (["core.Base"], "Base", False),
    ],
)  # fmt: skip
def test_a_base_class_is_known_by_its_name_or_by_the_end_of_its_dotted_name(
    names: list[str], name: str, known: bool
) -> None:
    assert (name in Roots(names)) == known
