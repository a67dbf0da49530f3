"""The anchors that compaction keeps: fewer, and still true to where the source was."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from backupd.logs.compact import thinned
from backupd.model import Anchor

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
steps = st.lists(st.tuples(st.integers(1, 400), st.sampled_from([0, 0, 0, 7])), min_size=1, max_size=80)


def course(steps: list[tuple[int, int]]) -> list[Anchor]:
    """Milliseconds and bytes, step by step."""
    found, at, position = [], NOON, 0
    for milliseconds, size in steps:
        at, position = at + timedelta(milliseconds=milliseconds), position + size
        found.append(Anchor(at, position))
    return found


@given(steps=steps)
def test_what_stays_is_true_dense_and_holds_both_ends(steps: list[tuple[int, int]]) -> None:
    """None is made up; between two that stay either nothing happened or less than a quarter of a second and two of the
    source's own steps passed."""
    anchors = course(steps)
    kept = thinned(reversed(anchors))
    assert set(kept) <= set(anchors)
    assert kept[0] == anchors[0] and kept[-1] == anchors[-1]
    assert thinned(kept) == kept
    for before, after in itertools.pairwise(kept):
        still = before.position == after.position
        assert still or after.at - before.at <= timedelta(milliseconds=250 + 800)


@given(seconds=st.integers(2, 300), most=st.integers(3, 20))
def test_there_are_never_more_than_an_object_may_hold(seconds: int, most: int) -> None:
    """A source that does little has days in one object."""
    anchors = course([(1000, 1)] * seconds)
    kept = thinned(anchors, most=most)
    assert len(kept) <= most
    assert kept[0] == anchors[0] and kept[-1] == anchors[-1]


def test_of_a_source_that_stands_still_two_say_all() -> None:
    """An hour of ten a second, in which nothing happened."""
    anchors = course([(100, 0)] * 36_000)
    assert thinned(anchors) == [anchors[0], anchors[-1]]
