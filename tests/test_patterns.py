"""Include and exclude patterns mean what .gitignore taught people to expect."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from backupd.archive.patterns import compile_patterns
from backupd.errors import UsageError


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("*.tmp", ["a.tmp", "x/y/b.tmp", "d.tmp/inside"], ["a.tmpx", "tmp"]),
        ("node_modules", ["node_modules/", "a/node_modules/", "a/node_modules/b/c.js"], ["node_modules2/"]),
        ("cache/", ["cache/", "a/cache/", "a/cache/file"], ["cache", "a/cache"]),
        ("/cache", ["cache", "cache/", "cache/x"], ["a/cache", "a/cache/"]),
        ("var/log", ["var/log", "var/log/", "var/log/x"], ["a/var/log", "var", "var/"]),
        ("logs/**", ["logs/a", "logs/a/b", "logs/d/"], ["logs", "logs/"]),
        ("**/logs/*.txt", ["logs/a.txt", "x/y/logs/a.txt"], ["logs/x/a.txt", "a.txt"]),
        ("a/**/z", ["a/z", "a/b/z", "a/b/c/z/below"], ["a/b/zz", "z", "b/a/z"]),
        ("**", ["a", "a/", "a/b"], []),
        ("f?o", ["foo", "x/fzo"], ["fo", "f/o"]),
        ("[a-c]x", ["ax", "cx"], ["dx", "ACx"]),
        ("[!a-c]x", ["dx"], ["ax"]),
        ("[]]x", ["]x"], ["x"]),
        ("[[]x", ["[x"], ["x", "]x"]),
        ("\\*", ["*", "d/*"], ["a"]),
        ("\\!important", ["!important"], ["important"]),
        ("./a", ["a"], ["b/a"]),
        ("new\nline", ["new\nline"], ["new"]),
        ("caf\udce9", ["caf\udce9", "x/caf\udce9"], ["cafe"]),
        ("*.log", ["a\n.log"], ["a.log\n"]),
    ],
)
def test_what_a_pattern_matches(pattern: str, matching: list[str], others: list[str]) -> None:
    """Directories are written with a closing slash here."""
    wanted = compile_patterns((), (pattern,))
    taken = compile_patterns((pattern,), ())
    for path in matching:
        assert not wanted(path.rstrip("/"), path.endswith("/")), path
        assert taken(path.rstrip("/"), path.endswith("/")), path
    for path in others:
        assert wanted(path.rstrip("/"), path.endswith("/")), path
        if not path.endswith("/"):
            assert not taken(path, False), path


def test_directories_on_the_way_to_an_include_are_taken() -> None:
    """Else nothing in them would ever be seen; others are not walked in vain."""
    wanted = compile_patterns(("srv/data/*.db", "etc/**/conf"), ())
    for path in ("srv", "srv/data", "etc", "etc/a/b"):
        assert wanted(path, True)
    for path in ("home", "srv/other", "srv/data/deeper"):
        assert not wanted(path, True)
    assert not wanted("srv", False)
    assert compile_patterns(("*.db",), ())("any/where", True)


def test_exclude_goes_before_include() -> None:
    """What is excluded is not brought back, nor anything below it."""
    wanted = compile_patterns(("docs",), ("docs/drafts/",))
    assert wanted("docs/a.txt", False)
    assert not wanted("docs/drafts", True)
    assert not wanted("docs/drafts/a.txt", False)


@pytest.mark.parametrize("pattern", ["", "/", "./", "!keep", "a[b", "x/[z-a]"])
def test_a_pattern_that_means_nothing_is_refused(pattern: str) -> None:
    """With a hint, before anything is read."""
    with pytest.raises(UsageError):
        compile_patterns((), (pattern,))


# --- against a plain reading of the rules ---------------------------------------------------------------

names = st.text("ab.*", min_size=1, max_size=3).filter(lambda name: name not in (".", ".."))
paths = st.lists(names, min_size=1, max_size=5)
parts = st.one_of(
    st.just("**"), st.text("ab.*?", min_size=1, max_size=3).filter(lambda p: "**" not in p and p != ".")
)
patterns = st.builds(
    lambda start, middle, end: start + "/".join(middle) + end,
    st.sampled_from(["", "/"]),
    st.lists(parts, min_size=1, max_size=4),
    st.sampled_from(["", "/"]),
)


def matches(parts: list[str], path: list[str]) -> bool:
    if not parts:
        return not path
    if parts[0] == "**":
        if len(parts) == 1:
            return bool(path)
        return matches(parts[1:], path) or (bool(path) and matches(parts, path[1:]))
    return bool(path) and fnmatchcase(path[0], parts[0]) and matches(parts[1:], path[1:])


def covered(pattern: str, path: list[str], is_dir: bool) -> bool:
    """The rules word by word: the path or a directory above it matches."""
    parts = [part for part in pattern.split("/") if part]
    if len(parts) == 1 and "/" not in pattern.rstrip("/"):
        parts = ["**", *parts] if parts[0] != "**" else parts
    for length in range(1, len(path) + 1):
        whole = length == len(path)
        if pattern.endswith("/") and whole and not is_dir:
            continue
        if matches(parts, path[:length]):
            return True
    return False


@example(["a/*"], ["a"], True)
@given(st.lists(patterns, max_size=3), paths, st.booleans())
def test_excludes_agree_with_the_rules(excludes: list[str], path: list[str], is_dir: bool) -> None:
    """The compiled expressions against a recursion over the parts."""
    wanted = compile_patterns((), excludes)
    assert wanted("/".join(path), is_dir) == (not any(covered(p, path, is_dir) for p in excludes))


@given(st.lists(patterns, min_size=1, max_size=3), st.lists(patterns, max_size=2), paths)
def test_a_wanted_file_is_reached_through_wanted_directories(
    includes: list[str], excludes: list[str], path: list[str]
) -> None:
    """A walk that skips every unwanted directory finds exactly what the rules want."""
    wanted = compile_patterns(includes, excludes)
    by_rule = any(covered(p, path, False) for p in includes) and not any(
        covered(p, path, False) for p in excludes
    )
    assert wanted("/".join(path), False) == by_rule
    if by_rule:
        assert all(wanted("/".join(path[:length]), True) for length in range(1, len(path)))
