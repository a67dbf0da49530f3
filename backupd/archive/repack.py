"""Which packs are worth writing again. Pure: sizes in, a choice out; `usage` measures, `compact` carries out.

To repack a pack costs what of it is still needed, and more: every index page that lies in it or names it is written
anew, and so is the manifest of every point that needs it. What several packs cause together they share.

By default packs are chosen so that the whole of it frees at least as many bytes as it writes. What it frees beyond
that, with the packs that go whole, pays for merging small packs, which free nothing and cost a request each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SMALL = 1 << 20
"""A pack below this is small: a sixteenth of a full one."""
MANY = 8
"""Fewer small packs than this are let be. As merged ones are small only while their sum is, bytes are moved by it
a few times in their life and not at every prune."""


@dataclass(frozen=True, slots=True)
class PackUse:
    """A pack that kept points name."""

    name: str
    size: int
    content: int
    """Bytes of it that their content takes: whole frames, shares of frames, that share of its directory. Pages that
    lie in it are not in this figure."""


@dataclass(frozen=True, slots=True)
class IndexUse:
    """A page or a manifest of kept points."""

    length: int
    touches: tuple[int, ...]
    """Numbers of the packs that it lies in or names: it is written anew when any of them is repacked."""
    lies_in: int | None = None
    """The pack that a page is freed with, one of those. None: a manifest, which a new one replaces at once."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What to repack, and what that will do. Estimates: of a frame needed in part, its share is taken."""

    packs: tuple[str, ...] = ()
    """Largest gain first."""
    rewritten: int = 0
    """Bytes to write: content, pages, manifests."""
    freed: int = 0
    """Bytes by which the repository gets smaller, once the old packs are gone."""


def choose(
    packs: Sequence[PackUse], index: Sequence[IndexUse], *, freed: int = 0, max_unused: float | None = None
) -> Choice:
    """The packs to repack. `freed`: bytes that go anyway, with packs that no kept point names.

    `max_unused` None: what frees at least what it writes. A share (0.05): the emptiest packs, until at most that
    share of what remains is unneeded, whatever it costs; and none where it is no more already.
    """
    selection = _Selection(packs, index)
    if max_unused is None:
        selection.take_what_pays()
    else:
        selection.take_until(max_unused)
    selection.merge_small(selection.balance + freed)
    if max_unused is not None:  # pages that moved with small packs have left holes in others
        selection.take_until(max_unused)
    return selection.choice()


class _Selection:
    """The packs taken so far, and what they cost together."""

    def __init__(self, packs: Sequence[PackUse], index: Sequence[IndexUse]) -> None:
        self._packs = packs
        self._index = index
        self._touching: list[list[int]] = [[] for _ in packs]
        for number, item in enumerate(index):
            for pack in item.touches:
                self._touching[pack].append(number)
        self._taken = bytearray(len(packs))
        self._touched = [0] * len(index)  # how many taken packs each touches
        self._size = self._content = self._pages = self._manifests = 0

    @property
    def rewritten(self) -> int:
        return self._content + self._pages + self._manifests

    @property
    def freed(self) -> int:
        return self._size - self._content - self._pages

    @property
    def balance(self) -> int:
        """Bytes freed beyond those rewritten."""
        return self.freed - self.rewritten

    def choice(self) -> Choice:
        taken = [pack for pack, is_taken in zip(self._packs, self._taken, strict=True) if is_taken]
        taken.sort(key=lambda pack: (pack.content - pack.size, pack.name))
        return Choice(tuple(pack.name for pack in taken), self.rewritten, self.freed)

    # --- ways of choosing ---------------------------------------------------------------------------------

    def take_what_pays(self) -> None:
        """The largest set in which every pack frees what it writes, its share of pages and manifests included.

        Start with all and leave out those that do not pay. The shares of the others only grow by that: none that
        was left out could pay later.
        """
        for number in range(len(self._packs)):
            self._take(number)
        while True:
            worth = {number: self._worth(number) for number in range(len(self._packs)) if self._taken[number]}
            losses = [number for number, gain in worth.items() if gain < 0]
            if not losses and self.balance < 0:  # shares are floats: the sum has the last word
                losses = [min(worth, key=lambda number: (worth[number], number))]
            if not losses:
                return
            for number in losses:
                self._leave(number)

    def take_until(self, max_unused: float) -> None:
        """The emptiest first, until little enough is unneeded. Pages that move leave holes in packs that were full,
        so it is looked at again until nothing is left to take."""
        while True:
            unused = self._unused()
            order = [number for number, count in enumerate(unused) if count > 0 and not self._taken[number]]
            order.sort(key=lambda number: (-unused[number] / self._packs[number].size, number))
            total = sum(pack.size for pack in self._packs)
            left = sum(unused)
            if not order or left <= max_unused * (total - self.freed):
                return
            for number in order:
                pages = self._pages
                self._take(number)
                left += self._pages - pages - (self._packs[number].size - self._packs[number].content)
                if left <= max_unused * (total - self.freed):
                    break

    def merge_small(self, budget: int) -> None:
        """The smallest first, as long as the budget lasts; none if it is not enough for many."""
        if not any(self._taken) and budget <= 0:
            return
        small = [n for n, pack in enumerate(self._packs) if pack.size < SMALL and not self._taken[n]]
        small.sort(key=lambda number: (self._packs[number].size, number))
        if len(small) < MANY:
            return
        start, merged = self.balance, []
        for number in small:
            self._take(number)
            if budget + self.balance - start < 0:
                self._leave(number)
                break
            merged.append(number)
        if len(merged) < MANY:
            for number in merged:
                self._leave(number)

    # --- sums -----------------------------------------------------------------------------------------------

    def _unused(self) -> list[int]:
        """Of each pack that is not taken, the bytes that nothing will need."""
        unused = [
            0 if taken else pack.size - pack.content
            for pack, taken in zip(self._packs, self._taken, strict=True)
        ]
        for item, touched in zip(self._index, self._touched, strict=True):
            if item.lies_in is not None and not touched:
                unused[item.lies_in] -= item.length
        return unused

    def _take(self, number: int) -> None:
        self._taken[number] = 1
        self._size += self._packs[number].size
        self._content += self._packs[number].content
        for item in self._touching[number]:
            self._touched[item] += 1
            if self._touched[item] == 1:
                self._count(item, 1)

    def _leave(self, number: int) -> None:
        self._taken[number] = 0
        self._size -= self._packs[number].size
        self._content -= self._packs[number].content
        for item in self._touching[number]:
            self._touched[item] -= 1
            if self._touched[item] == 0:
                self._count(item, -1)

    def _count(self, item: int, sign: int) -> None:
        if self._index[item].lies_in is None:
            self._manifests += sign * self._index[item].length
        else:
            self._pages += sign * self._index[item].length

    def _worth(self, number: int) -> float:
        """What taking this pack frees beyond what it writes. A page counts twice: written, and not freed."""
        pack = self._packs[number]
        gain = float(pack.size - 2 * pack.content)
        for item in self._touching[number]:
            index = self._index[item]
            gain -= (1 if index.lies_in is None else 2) * index.length / self._touched[item]
        return gain
