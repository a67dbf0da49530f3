"""What is wrong with a configuration, in plain words: where, what, and what to write instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from backupd.config.values import Mistaken, check_name, closest
from backupd.errors import UsageError


class Mistake(NamedTuple):
    """One thing wrong: the key it is at, what is wrong, what to write instead."""

    key: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.key, self.message) if part)


class ConfigInvalid(UsageError):
    """A configuration with mistakes; `mistakes` has them all."""

    def __init__(self, origin: str, mistakes: list[Mistake]) -> None:
        self.origin = origin
        self.mistakes = tuple(mistakes)
        if len(mistakes) == 1:
            super().__init__(f"{origin}: {mistakes[0]}", hint=mistakes[0].hint)
            return
        lines = [f"{origin} has {len(mistakes)} mistakes"]
        for m in mistakes:
            lines.append(f"  {m}")
            if m.hint:
                lines.append(f"    hint: {m.hint}")
        super().__init__("\n".join(lines), hint="mend each of them; `backupd check` tells when all is well")


def check_names(tree: dict[str, Any]) -> Iterator[Mistake]:
    """Which names of sources and stacks cannot be."""
    for kind in ("sources", "stacks"):
        tables = tree.get(kind)
        for name, table in tables.items() if isinstance(tables, dict) else ():
            try:
                check_name(name)
            except Mistaken as wrong:
                yield Mistake(f"{kind}.{name}", wrong.message, wrong.hint)
            if kind == "sources" and isinstance(table, dict) and "name" in table:
                yield Mistake(f"sources.{name}.name", "unknown key", f"the name is in [sources.{name}]")


def dotted(at: tuple[str, ...]) -> str:
    """A key as people write it."""
    return ".".join(at)


def cross_check(tree: dict[str, Any]) -> Iterator[Mistake]:
    """What only the whole tells: stacks without their sources, names and places that are there twice."""
    sources = tree.get("sources") if isinstance(tree.get("sources"), dict) else {}
    stacks = tree.get("stacks") if isinstance(tree.get("stacks"), dict) else {}
    assert isinstance(sources, dict)  # noqa: S101  for the type checker
    assert isinstance(stacks, dict)  # noqa: S101
    by_case: dict[str, str] = {}
    for name in [*sources, *stacks]:
        other = by_case.setdefault(name.lower(), name)
        if other != name:
            yield Mistake(name, f"differs from {other} in case alone", "some stores cannot tell them apart")
    for name, stack in stacks.items():
        if name in sources:
            yield Mistake(f"stacks.{name}", "a source has this name too", "give the stack another one")
        listed = stack.get("sources") if isinstance(stack, dict) else None
        members = listed if isinstance(listed, list) else []
        for number, member in enumerate(members):
            key = f"stacks.{name}.sources.{number}"
            if member not in sources:
                hint = closest(str(member), sources) or f"there are {', '.join(sources) or 'no sources'}"
                yield Mistake(key, f'there is no source "{member}"', hint)
            elif members.index(member) != number:
                yield Mistake(key, f'"{member}" stands here twice', "name it once")
    yield from _doubles(sources)


def _doubles(sources: dict[str, Any]) -> Iterator[Mistake]:
    """Two sources that read the very same thing are a copy that was not finished."""
    seen: dict[str, str] = {}
    for name, source in sources.items():
        if not isinstance(source, dict):
            continue
        place = {k: source.get(k) for k in ("driver", "url", "container", "path", "volume", "databases")}
        place |= {k: source.get(k) for k in ("include", "exclude")}
        if not any(place[k] for k in ("url", "container", "path", "volume")):
            continue
        other = seen.setdefault(repr(place), name)
        if other != name:
            yield Mistake(f"sources.{name}", f"is the same as sources.{other}", "take one of the two out")
