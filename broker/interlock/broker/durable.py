"""Names that outlive a power cut."""

from __future__ import annotations

import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """On disk when this returns: which files the folder has, and under which names. OSError if it can't be.

    The content of a file is synced by itself; after a power cut one whose folder was not may be gone, or the old one
    that it replaced may be back.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path, *, mode: int = 0o777) -> None:
    """Make it, and those above it that are missing, so that they outlive a power cut too."""
    missing = [made for made in (folder, *folder.parents) if not made.exists()]
    folder.mkdir(mode=mode, parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)
