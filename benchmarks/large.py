"""Few large files: parts of them written over, a byte put before one of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from benchmarks.corpus import Maker
from benchmarks.goals import usual
from benchmarks.scenario import Say, Scenario, Step
from benchmarks.states import keep, put_back

SHARE = 0.01
_PIECE = 8 << 20
_FILES = (("text.log", "text", 0.2), ("records.json", "records", 0.25), ("image.raw", "binary", 0.3))
_NOISE = ("film.mp4", "noise", 0.25)


def large(work: Path, *, size: int, say: Say) -> Scenario:
    """`size` bytes in four files: text, records, binary, and one that does not compress."""
    say(f"making four files of {size / 1e6:,.0f} MB")
    tree, earlier = work / "tree", work / "earlier"
    tree.mkdir(parents=True)
    maker = Maker(seed=11)
    for name, kind, share in (*_FILES, _NOISE):
        write_file(tree / name, getattr(maker, kind), int(size * share))

    def change(number: int) -> None:
        if not earlier.exists():
            keep(tree, earlier)
        for path in sorted(tree.iterdir()):
            write_over(path, share=SHARE, seed=number)

    steps = (
        Step("full", restore="restore"),
        Step("unchanged", runs=3),
        Step("1% changed", change),
        Step("byte ahead", lambda number: byte_ahead(tree / "image.raw", number)),
        Step("went back", lambda _: put_back(earlier, tree), restore="restore last"),
    )
    changes = {"1% changed": 1.0, "byte ahead": 1.0, "went back": 1.0}
    return Scenario("large", f"four files, {size / 1e6:,.0f} MB", tree, steps, tuple(usual(changes)))


def write_file(path: Path, make: Callable[[int], bytes], size: int) -> None:
    """In pieces: a large file is never in memory."""
    with path.open("wb") as file:
        while size > 0:
            size -= file.write(make(min(size, _PIECE)))


def write_over(path: Path, *, share: float, seed: int) -> None:
    """New bytes over `share` of a file, in runs of 4 to 64 KiB anywhere in it: an image of a disk in use."""
    numbers = random.Random(seed)
    size = path.stat().st_size
    left = int(size * share)
    with path.open("r+b") as file:
        while left > 0:
            run = min(left, numbers.randrange(1, 17) * 4096)
            file.seek(numbers.randrange(max(1, size - run)))
            file.write(numbers.randbytes(run // 2).hex().encode())
            left -= run


def byte_ahead(path: Path, number: int) -> None:
    """All of a file's content moves on by one byte."""
    with path.with_name("written").open("wb") as new, path.open("rb") as old:
        new.write(b"%c" % (number % 256))
        while piece := old.read(_PIECE):
            new.write(piece)
    path.with_name("written").rename(path)
