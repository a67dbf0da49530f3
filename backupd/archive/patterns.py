"""Include and exclude patterns: which entries of a tree are taken. Pure; nothing is looked up on disk.

A pattern is compared with the path relative to the root of the tree, as `.gitignore` does it:

- `*.tmp`, `node_modules`: no slash but at the end: a name, at any depth
- `/cache`, `var/cache`: a slash elsewhere: the path from the root
- `cache/`: a slash at the end: directories only
- `*` and `?` stand for characters within a name, `[a-z]` and `[!a-z]` for one of a set, `\\` takes the next
  character as it is
- `**` as a whole part of the path stands for any number of directories, also none; `logs/**` for all below

What matches a directory goes for everything in it. Exclude goes before include. Where there are includes,
only what one of them matches is taken, and the directories on the way to it; when an include has no anchor
(`*.pdf`), any directory may be on the way, so all are taken, empty or not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from backupd.errors import UsageError

_ANY_DEPTH = "(?:[^/]+/)*"

Matcher = Callable[[str, bool], bool]
"""(path relative to the root, is it a directory?) -> is it taken?"""


def compile_patterns(include: Iterable[str], exclude: Iterable[str]) -> Matcher:
    """One function for both lists; about a microsecond a call.

    Raises UsageError for a pattern that cannot mean anything: empty, `!negated`, an unclosed `[`.
    """
    included = [_Pattern(text) for text in include]
    excluded = [_Pattern(text) for text in exclude]
    refuse = _any(pattern.covers for pattern in excluded)
    if not included:
        return lambda path, is_dir: refuse(path + "/" if is_dir else path) is None
    accept = _any(pattern.covers for pattern in included)
    lead = _any(pattern.leads for pattern in included)

    def wanted(path: str, is_dir: bool) -> bool:
        # The expressions tell a directory by its closing slash.
        name = path + "/" if is_dir else path
        if refuse(name) is not None:
            return False
        return accept(name) is not None or (is_dir and lead(name) is not None)

    return wanted


def _any(expressions: Iterable[str]) -> Callable[[str], re.Match[str] | None]:
    joined = "|".join(dict.fromkeys(expressions))
    return re.compile(joined or r"(?!)", re.DOTALL).fullmatch


def escape(path: str) -> str:
    """A pattern that means this path and no other."""
    return re.sub(r"([\\*?\[\]!])", r"\\\1", path)


class _Pattern:
    """Two regular expressions for names that end in a slash where they are directories."""

    def __init__(self, text: str) -> None:
        if text.startswith("!"):
            raise UsageError(
                f"the pattern {text!r} begins with '!'",
                hint="there is no negation: name what is wanted in include, or write \\! for such a name",
            )
        only_directories = text.endswith("/")
        parts = [part for part in text.split("/") if part not in ("", ".")]
        if not parts:
            raise UsageError(
                f"the pattern {text!r} is empty", hint="leave it out; nothing stands for everything"
            )
        if len(parts) == 1 and "/" not in text.rstrip("/"):
            parts.insert(0, "**")
        parts = [part for at, part in enumerate(parts) if part != "**" or parts[at + 1 : at + 2] != ["**"]]
        way = _way(parts[:-1])
        if parts[-1] == "**":  # what lies below, not the directory itself
            self.covers = way + ("[^/]+/.*" if only_directories else ".+")
            self.leads = _leading(parts)
        else:
            self.covers = way + _name(parts[-1]) + ("/.*" if only_directories else "(?:/.*)?")
            self.leads = _leading(parts[:-1])


def _way(parts: list[str]) -> str:
    """The expression for directories on the way, each with its slash."""
    return "".join(_ANY_DEPTH if part == "**" else _name(part) + "/" for part in parts)


def _leading(parts: list[str]) -> str:
    """The expression for any part of the way, from its start."""
    made = ""
    for part in reversed(parts):
        made = _ANY_DEPTH + made if part == "**" else f"(?:{_name(part)}/{made})?"
    return made or r"(?!)"


def _name(part: str) -> str:
    """The expression for one name of a path."""
    if not part.strip("*"):
        return "[^/]+"  # no name is empty: `cache/*` is not the directory `cache/` itself
    made, at = "", 0
    while at < len(part):
        letter = part[at]
        at += 1
        if letter == "*":
            made += "[^/]*"
        elif letter == "?":
            made += "[^/]"
        elif letter == "\\" and at < len(part):
            made += re.escape(part[at])
            at += 1
        elif letter == "[":
            end = part.find("]", at + 2 if part[at : at + 1] in ("!", "^") else at + 1)
            if end < 0:
                raise UsageError(
                    f"the pattern part {part!r} has an unclosed '['", hint="write \\[ for a bracket"
                )
            made += _set(part, part[at:end])
            at = end + 1
        else:
            made += re.escape(letter)
    return made


def _set(part: str, inside: str) -> str:
    negated = inside[0] in "!^"
    members = inside[1:] if negated else inside
    made = "".join("\\" + letter if letter in "\\[]&~|^" else letter for letter in members)
    expression = f"(?!/)[{'^' if negated else ''}{made}]"
    try:
        re.compile(expression)
    except re.error:
        raise UsageError(f"the pattern part {part!r} has a set that is none: [{inside}]") from None
    return expression
