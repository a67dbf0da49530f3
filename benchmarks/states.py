"""A tree as it was: kept aside, and brought back in place, as whoever restores a file by hand does."""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
from pathlib import Path


def keep(tree: Path, aside: Path) -> None:
    """A copy with modes, times and owners; `aside` is not there yet."""
    aside.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "--archive", "--no-target-directory", str(tree), str(aside)], check=True)


def put_back(aside: Path, tree: Path) -> None:
    """Make the tree what it was. A file of the same content keeps its inode; another is written over."""
    _remove_others(aside, tree)
    for folder, directories, names in os.walk(aside):
        there = tree / os.path.relpath(folder, aside)
        for name in directories:
            if not os.path.lexists(there / name):
                keep(Path(folder, name), there / name)
        for name in names:
            _put_back_file(Path(folder, name), there / name)


def _put_back_file(source: Path, target: Path) -> None:
    if not os.path.lexists(target):
        subprocess.run(["cp", "--archive", str(source), str(target)], check=True)
        return
    if source.is_symlink():
        return
    if not filecmp.cmp(source, target, shallow=False):
        shutil.copyfile(source, target)
    before, now = source.stat(), target.stat()
    if now.st_mode != before.st_mode:
        target.chmod(before.st_mode)
    if now.st_mtime_ns != before.st_mtime_ns:
        os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))


def _remove_others(aside: Path, tree: Path) -> None:
    for folder, directories, names in os.walk(tree):
        there = aside / os.path.relpath(folder, tree)
        for name in names:
            if not os.path.lexists(there / name):
                Path(folder, name).unlink()
        for name in [name for name in directories if not os.path.lexists(there / name)]:
            directories.remove(name)
            path = Path(folder, name)
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
