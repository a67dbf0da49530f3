"""Which packs are repacked: never more bytes written than freed, unless somebody says so."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from backupd.archive.repack import MANY, SMALL, Choice, IndexUse, PackUse, choose

MB = 1 << 20


@st.composite
def repositories(draw: st.DrawFn) -> tuple[list[PackUse], list[IndexUse]]:
    """Packs with pages in them, needed to any part; manifests over some of them."""
    count = draw(st.integers(1, 20))
    numbers = st.integers(0, count - 1)
    pages = [
        IndexUse(length, tuple({lies_in, *names}), lies_in)
        for length, lies_in, names in draw(
            st.lists(st.tuples(st.integers(1, 50_000), numbers, st.lists(numbers, max_size=4)), max_size=30)
        )
    ]
    packs = []
    for number in range(count):
        inside = sum(page.length for page in pages if page.lies_in == number)
        content = draw(st.one_of(st.just(0), st.integers(0, 4 * MB)))
        unused = draw(st.one_of(st.just(0), st.integers(0, 16 * MB)))
        packs.append(PackUse(f"a/{number:04d}", content + unused + inside, content))
    manifests = [
        IndexUse(draw(st.integers(100, 20_000)), tuple(names))
        for names in draw(st.lists(st.sets(numbers, min_size=1), max_size=4))
    ]
    return packs, [*pages, *manifests]


def carried_out(packs: list[PackUse], index: list[IndexUse], choice: Choice) -> tuple[int, int, int, int]:
    """Told from the definition: bytes written, bytes by which it shrinks, what remains, what of that is unneeded."""
    taken = {number for number, pack in enumerate(packs) if pack.name in choice.packs}
    moved = [item for item in index if taken.intersection(item.touches)]
    stays = [item for item in index if not taken.intersection(item.touches) and item.lies_in is not None]
    pages = sum(item.length for item in moved if item.lies_in is not None)
    manifests = sum(item.length for item in moved if item.lies_in is None)
    content = sum(packs[number].content for number in taken)
    written = content + pages
    old = [pack for number, pack in enumerate(packs) if number not in taken]
    left = sum(pack.size for pack in old) + written
    needed = sum(pack.content for pack in old) + sum(item.length for item in stays) + written
    return written + manifests, sum(pack.size for pack in packs) - left, left, left - needed


@settings(max_examples=400)
@given(repositories(), st.integers(0, 4 * MB))
def test_never_more_is_written_than_is_freed(
    repository: tuple[list[PackUse], list[IndexUse]], removed: int
) -> None:
    packs, index = repository
    choice = choose(packs, index)
    written, freed, _, _ = carried_out(packs, index, choice)
    assert (choice.rewritten, choice.freed) == (written, freed)
    assert written <= freed
    with_more = choose(packs, index, freed=removed)
    written, freed, _, _ = carried_out(packs, index, with_more)
    assert written <= freed + removed


@example(
    ([*(PackUse(f"a/{n:04}", 0, 0) for n in range(10)), PackUse("a/0010", 3, 2), PackUse("a/0011", 2, 0)],
     [IndexUse(1, (0, 10), 10)]),
    0.0,
)  # fmt: skip
@settings(max_examples=400)
@given(repositories(), st.floats(0, 1))
def test_a_share_that_may_be_unneeded_is_kept_to(
    repository: tuple[list[PackUse], list[IndexUse]], share: float
) -> None:
    packs, index = repository
    choice = choose(packs, index, max_unused=share)
    written, freed, left, unneeded = carried_out(packs, index, choice)
    assert (choice.rewritten, choice.freed) == (written, freed)
    assert unneeded <= share * left


@given(repositories())
def test_what_is_needed_whole_is_let_be(repository: tuple[list[PackUse], list[IndexUse]]) -> None:
    packs, index = repository
    inside = [sum(item.length for item in index if item.lies_in == n) for n in range(len(packs))]
    whole = [PackUse(p.name, max(SMALL, p.content + inside[n]), max(SMALL, p.content + inside[n]) - inside[n])
             for n, p in enumerate(packs)]  # fmt: skip
    assert choose(whole, index) == Choice()
    assert choose(whole, index, max_unused=0.0) == Choice()


@given(repositories())
def test_what_gains_most_comes_first(repository: tuple[list[PackUse], list[IndexUse]]) -> None:
    packs, index = repository
    unneeded = {pack.name: pack.size - pack.content for pack in packs}
    gains = [unneeded[name] for name in choose(packs, index).packs]
    assert gains == sorted(gains, reverse=True)


def test_half_empty_packs_are_repacked_and_fuller_ones_are_not() -> None:
    packs = [PackUse("a/0000", 16 * MB, 7 * MB), PackUse("b/0000", 16 * MB, 9 * MB)]
    assert choose(packs, []).packs == ("a/0000",)
    assert choose(packs, [], max_unused=0.05).packs == ("a/0000", "b/0000")
    assert choose(packs, [], max_unused=0.6).packs == ()


def test_a_pack_that_every_page_names_must_pay_for_the_pages() -> None:
    packs = [PackUse("a/0000", 200_000, 50_000), PackUse("b/0000", 16 * MB, 15 * MB)]
    pages = [IndexUse(10_000, (0, 1), 1) for _ in range(4)]
    assert choose(packs, pages).packs == ("a/0000",)
    pages = [IndexUse(10_000, (0, 1), 1) for _ in range(6)]
    assert choose(packs, pages).packs == ()


def test_many_small_packs_are_merged_when_something_else_pays_for_it() -> None:
    small = [PackUse(f"s/{number:04d}", 20_000, 20_000) for number in range(MANY)]
    large = PackUse("l/0000", 16 * MB, MB)
    assert choose(small, []) == Choice()
    assert len(choose([*small, large], []).packs) == MANY + 1
    assert len(choose(small, [], freed=MB).packs) == MANY
    assert choose(small[1:], [], freed=MB) == Choice()  # few: let be
    assert choose(small, [], freed=10_000) == Choice()  # not paid for
