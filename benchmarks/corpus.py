"""Trees to back up, made from a seed: the same bytes on every machine.

A mix as one finds beside services: source code and text, JSON, binaries with structure, pictures and archives that
do not compress, some files of many megabytes, symlinks, executables, empty files and directories.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import stat
import string
from dataclasses import dataclass
from pathlib import Path

_PHRASES = 120_000
_PASSAGE = 25  # phrases
_FILES_PER_DIRECTORY = 12
_LARGEST_SMALL = 900_000
_LARGE_EVERY = 1500  # one file in this many has 1 to 12 MB


class Maker:
    """Content from one generator of numbers; a second one with the same seed makes the same."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        words = [self._word() for _ in range(9000)]
        breaks = [" ", " ", " ", " = ", "(", ")\n    ", ", ", ".", "\n", ": ", "_"]
        choose, common = self.random.choice, words[:600]
        self._phrases = [
            f"{choose(common)}{choose(breaks)}{choose(words)}{choose(breaks)}{choose(common)}{choose(breaks)}"
            for _ in range(_PHRASES)
        ]
        self._keys = [f'"{word}": ' for word in common[:60]]

    def _word(self) -> str:
        length = min(14, max(2, int(self.random.gauss(6, 2.5))))
        return "".join(self.random.choices("eeeetaoinsrhldcumfpgwybvkxjqz", k=length))

    def text(self, size: int) -> bytes:
        """Like source code and prose, and as hard for zstd as Python's own library: level 3 makes 3.6 times less of
        it (3.75 there) at 0.97 of the speed there. Words that come often, passages that come again in a file."""
        # A cubed uniform number picks the first phrases far more often, as words are used.
        phrases, uniform = self._phrases, self.random.random
        count = size // 14 + 1
        made: list[str] = []
        while len(made) < count:
            if len(made) > _PASSAGE * 2 and uniform() < 0.2:
                at = int(uniform() * (len(made) - _PASSAGE))
                made += made[at : at + _PASSAGE]
            else:
                made += [phrases[int(uniform() ** 3 * _PHRASES)] for _ in range(_PASSAGE)]
        return "".join(made)[:size].encode().ljust(size, b"\n")

    def records(self, size: int) -> bytes:
        """Like JSON and logs: the same keys in the same order, values that are often the same."""
        choose, number = self.random.choice, self.random.randrange
        keys = [choose(self._keys) for _ in range(5)]
        values = [choose(self._phrases).strip() for _ in range(12)]
        moment = number(10**9)
        out = []
        for _ in range(size // 90 + 1):
            moment += number(300)
            out.append(
                f'{{{keys[0]}{moment}, {keys[1]}"{choose(values)}", {keys[2]}"{choose(values)}", '
                f"{keys[3]}{number(1000)}, {keys[4]}false}}\n"
            )
        return "".join(out)[:size].encode().ljust(size, b"\n")

    def binary(self, size: int) -> bytes:
        """Like object files and indexes: runs of zeros, small numbers, noise between."""
        out = []
        left = size
        while left > 0:
            step = min(left, self.random.randrange(64, 1024))
            kind = self.random.randrange(4)
            if kind == 0:
                out.append(bytes(step))
            elif kind == 1:
                out.append(self.random.randbytes(step // 4 + 1).hex().encode()[:step].ljust(step, b"\0"))
            elif kind == 2:
                unit = self.random.randbytes(2) + bytes(6)
                out.append((unit * (step // 8 + 1))[:step])
            else:
                out.append(self.random.randbytes(step))
            left -= step
        return b"".join(out)

    def noise(self, size: int) -> bytes:
        """Like pictures: nothing to compress."""
        return self.random.randbytes(size)

    def size(self) -> int:
        """Of a small file: half of them under 5 KB, 14 KB on average."""
        return min(_LARGEST_SMALL, int(math.exp(self.random.gauss(math.log(5000), 1.45))))

    def file(self, number: int) -> tuple[str, bytes]:
        """(ending of the name, content)"""
        if number % _LARGE_EVERY == _LARGE_EVERY - 1:
            size = self.random.randrange(1 << 20, 12 << 20)
            return "dat", self.large(number, size)
        dice = self.random.random()
        size = self.size()
        if dice < 0.72:
            return self.random.choice(("py", "c", "h", "md", "txt", "js")), self.text(size)
        if dice < 0.84:
            return "json", self.records(size)
        if dice < 0.95:
            return "o", self.binary(size)
        if dice < 0.99:
            return "png", self.noise(size * 2)
        return "empty", b""

    def large(self, number: int, size: int) -> bytes:
        makers = (self.records, self.binary, self.text, self.noise)
        return makers[number // _LARGE_EVERY % len(makers)](size)


@dataclass(frozen=True, slots=True)
class Corpus:
    """What was made."""

    root: Path
    files: int
    bytes: int


def make_tree(root: Path, *, files: int, seed: int = 1) -> Corpus:
    """A tree of `files` files, some 16 KB each, in a directory for every dozen."""
    maker = Maker(seed)
    numbers = maker.random
    root.mkdir(parents=True)
    directories = [root]
    for _ in range(files // _FILES_PER_DIRECTORY):
        # The last ones made are chosen more often: trees are deep in places, not everywhere.
        parent = directories[max(0, len(directories) - 1 - int(numbers.expovariate(1 / 40)))]
        if len(parent.relative_to(root).parts) > 8:
            parent = root
        directory = parent / f"{_name(numbers)}{len(directories)}"
        directory.mkdir()
        directories.append(directory)
    total = 0
    for number in range(files):
        ending, content = maker.file(number)
        path = numbers.choice(directories) / f"{_name(numbers)}{number}.{ending}"
        path.write_bytes(content)
        total += len(content)
        if number % 23 == 0:
            path.chmod(0o755)
        if number % 97 == 0:
            path.with_name(f"link{number}").symlink_to(path.name)
    return Corpus(root, files, total)


def change_tree(root: Path, *, share: float, seed: int) -> int:
    """Change `share` of the files: edited in place, grown, replaced, new, gone, moved; how many."""
    maker = Maker(seed)
    numbers = maker.random
    every = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink()]
    chosen = numbers.sample(every, max(1, int(len(every) * share)))
    for index, path in enumerate(chosen):
        kind = index % 10
        if kind < 5:
            content = bytearray(path.read_bytes())
            at = numbers.randrange(len(content) + 1)
            content[at : at + 40] = maker.text(60)
            path.write_bytes(content)
        elif kind < 7:
            with path.open("ab") as file:
                file.write(maker.text(400))
        elif kind == 7:
            path.write_bytes(maker.text(maker.size()))
        elif kind == 8:
            path.with_name(f"{_name(numbers)}-new{seed}-{index}.txt").write_bytes(maker.text(maker.size()))
        else:
            path.unlink()
    return len(chosen)


def digest_tree(root: Path) -> str:
    """Of every name, kind, permission, link target and content below `root`. Reading it warms the page cache."""
    whole = hashlib.blake2b(digest_size=16)
    for folder, directories, names in os.walk(root):
        directories.sort()
        for name in sorted([*names, *(d for d in directories if os.path.islink(os.path.join(folder, d)))]):
            path = os.path.join(folder, name)
            info = os.lstat(path)
            row = [os.path.relpath(path, root), str(info.st_mode)]
            if stat.S_ISLNK(info.st_mode):
                row.append(os.readlink(path))
            elif stat.S_ISREG(info.st_mode):
                with open(path, "rb", buffering=0) as file:
                    row.append(hashlib.blake2b(file.read(), digest_size=16).hexdigest())
                row.append(str(info.st_mtime_ns // 10**9))
            whole.update("\0".join(row).encode("utf-8", "surrogateescape") + b"\n")
        if folder != str(root):
            row = [os.path.relpath(folder, root), str(os.lstat(folder).st_mode)]
            whole.update("\0".join(row).encode("utf-8", "surrogateescape") + b"\n")
    return whole.hexdigest()


def tree_size(root: Path) -> int:
    """Bytes in files below `root`: what a repository takes."""
    return sum(
        os.lstat(os.path.join(folder, name)).st_size for folder, _, names in os.walk(root) for name in names
    )


def _name(numbers: random.Random) -> str:
    return "".join(numbers.choices(string.ascii_lowercase, k=numbers.randrange(3, 10)))
