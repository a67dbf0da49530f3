"""The pages of an index, read: those that lie side by side in their pack in one request.

A request takes its time however little it asks for, and a page is a few kilobytes: of a distant store one by one
would be a wait for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial

from backupd.archive.pack import SKIPPABLE_HEADER
from backupd.archive.page import Page, decode_page
from backupd.archive.parallel import in_order
from backupd.errors import Damaged
from backupd.repository import PageRef, Repository

RUN_SIZE = 256 << 10
"""Bytes of one request for pages, some thirty of them."""
_KEPT = 8
"""Runs held as they are stored: what was moved lies in another order now, and is asked for to and fro."""


def runs(pages: Iterable[PageRef]) -> Iterator[list[PageRef]]:
    """The pages in their order, those together that follow one another in a pack. Pure."""
    run: list[PageRef] = []
    for page in pages:
        if run:
            last = run[-1]
            follows = page.pack == last.pack and page.offset == last.offset + last.length + SKIPPABLE_HEADER
            if not follows or page.offset + page.length - run[0].offset > RUN_SIZE:
                yield run
                run = []
        run.append(page)
    if run:
        yield run


def read_pages(repository: Repository, source: str, pages: Iterable[PageRef]) -> Iterator[Page]:
    """Read, checked and decoded, in their order; some requests ahead. Raises Damaged."""
    decode = partial(decode_stored, repository)
    for run, stored in in_order(runs(pages), lambda run: (run, read_run(repository, source, run))):
        yield from map(decode, run, stored)


def read_run(repository: Repository, source: str, run: Sequence[PageRef]) -> list[bytes]:
    """Neighbouring pages as they are stored, in one request. Raises Damaged."""
    start = run[0].offset
    data = repository.read_pack(source, run[0].pack, start, run[-1].offset + run[-1].length - start)
    return [data[page.offset - start : page.offset - start + page.length] for page in run]


def read_page(repository: Repository, source: str, page: PageRef) -> Page:
    """One page. Raises Damaged."""
    return decode_stored(repository, page, *read_run(repository, source, [page]))


def decode_stored(repository: Repository, page: PageRef, stored: bytes) -> Page:
    """A page that was read. Raises Damaged."""
    plain = repository.codec.decode(stored, page.size)
    if repository.codec.digest(plain).hex() != page.digest:
        raise Damaged(f"an index page in the pack {page.pack} is not what was written")
    return decode_page(plain)


class PageReader:
    """Pages by number, asked for more or less in their order. One that is damaged is empty, and `damaged` told."""

    def __init__(
        self,
        repository: Repository,
        source: str,
        pages: Sequence[PageRef],
        *,
        damaged: Callable[[Damaged], object],
    ) -> None:
        self._repository, self._source, self._damaged = repository, source, damaged
        self._runs: list[tuple[int, list[PageRef]]] = []  # with the number of the first
        self._run_of: list[int] = []
        for run in runs(pages):
            self._runs.append((len(self._run_of), run))
            self._run_of += [len(self._runs) - 1] * len(run)
        self._read: dict[int, list[bytes]] = {}
        self._coming: dict[int, Future[list[bytes]]] = {}

    def page(self, number: int) -> Page:
        """One page; what lies beside it is kept for what is asked next, and some that were asked for before."""
        index = self._run_of[number]
        first, run = self._runs[index]
        stored = self._read.pop(index, None)
        if stored is None:
            stored = self._fetch(index)
            if len(self._read) == _KEPT:
                del self._read[next(iter(self._read))]  # the one that was asked for longest ago
        self._read[index] = stored
        return self._decode(run[number - first], stored[number - first]) if stored else Page([], [])

    def all(self) -> Iterator[Page]:
        """Every page, read side by side."""
        numbers = range(len(self._runs))
        for (_, run), stored in zip(self._runs, in_order(numbers, self._read_run), strict=True):
            for page, data in zip(run, stored, strict=False):
                yield self._decode(page, data)

    def _fetch(self, index: int) -> list[bytes]:
        if not self._repository.distant:
            return self._read_run(index)
        self._coming = {number: run for number, run in self._coming.items() if number >= index}
        for near in range(index, min(index + 2, len(self._runs))):
            if near not in self._coming:
                self._coming[near] = self._ahead.submit(self._read_run, near)
        return self._coming.pop(index).result()

    @cached_property
    def _ahead(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(2, thread_name_prefix="page")

    def _read_run(self, index: int) -> list[bytes]:
        try:
            return read_run(self._repository, self._source, self._runs[index][1])
        except Damaged as error:
            self._damaged(error)
            return []

    def _decode(self, page: PageRef, stored: bytes) -> Page:
        try:
            return decode_stored(self._repository, page, stored)
        except Damaged as error:
            self._damaged(error)
            return Page([], [])
