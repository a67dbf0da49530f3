"""One stage of parallel work: in order, bounded, and ended cleanly by the first error."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backupd.archive.pack import Directory, Frame
from backupd.archive.parallel import SPAN, in_order, spans


def running() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("parallel")}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(), max_size=40), st.integers(1, 5), st.integers(1, 8))
def test_results_come_in_the_order_of_the_items(items: list[int], workers: int, ahead: int) -> None:
    assert list(in_order(items, lambda item: item * 2, workers=workers, ahead=ahead)) == [
        i * 2 for i in items
    ]


def test_an_endless_row_is_never_more_than_so_far_ahead() -> None:
    begun = itertools.count()
    newest = 0

    def work(item: int) -> int:
        nonlocal newest
        newest = max(newest, item)
        next(begun)
        return item

    for result in in_order(itertools.count(), work, ahead=5):
        assert newest <= result + 5
        if result == 200:
            break
    assert next(begun) <= 206


def test_an_error_is_raised_in_its_place_and_no_thread_is_left() -> None:
    closed = []

    def items() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            closed.append(True)

    def work(item: int) -> int:
        if item == 7:
            raise ValueError("seven")
        return item

    seen: list[int] = []
    with pytest.raises(ValueError, match="seven"):
        seen.extend(in_order(items(), work))
    assert seen == list(range(7))
    assert closed
    assert not running()


def test_stages_after_one_another_end_together_when_one_fails() -> None:
    def fail(item: int) -> int:
        if item > 20:
            raise ValueError("no")
        return item

    stages = in_order(in_order(in_order(itertools.count(), lambda i: i), fail), lambda i: i)
    with pytest.raises(ValueError, match="no"):
        for _ in stages:
            pass
    assert not running()


sizes = st.lists(st.tuples(st.integers(1, SPAN), st.integers(1, SPAN), st.booleans()), max_size=30)


@given(sizes)
def test_spans_are_the_wanted_frames_in_order_and_none_is_large(frames: list[tuple[int, int, bool]]) -> None:
    directory = Directory()
    at = 0
    for length, size, _ in frames:
        directory.frames.append(Frame(at, length, size, 0))
        at += length
    wanted = [number for number, (_, _, is_wanted) in enumerate(frames) if is_wanted]
    found = list(spans("a/0000", directory, wanted))
    assert [number for span in found for number in range(span.first, span.end)] == wanted
    for span in found:
        assert span.length <= SPAN
        assert sum(frame.size for frame in directory.frames[span.first : span.end]) <= SPAN
