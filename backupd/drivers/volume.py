"""Directories and Docker volumes: a tree with every kind of entry, as it is.

A directory, and a volume whose path this process can read, is read by the archive engine itself: quick, and what
did not change is not opened. Any other volume is mounted read-only into a helper container, where GNU tar reads
it (all but attributes that begin with `trusted.`: a container without CAP_SYS_ADMIN does not see them). Either
way files may vanish, grow and shrink meanwhile: the rest is whole, and the run names them. Sockets are
left out; whoever listens makes them anew.

A restored tree is compared with the recovery point, entry by entry, before the restore is called done.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, cast

from backupd.drivers._tarstream import IteratorFile
from backupd.drivers.volume_facts import (
    LISTING,
    facts_of,
    found_below,
    found_in_archive,
    found_in_listing,
    found_in_tar,
)
from backupd.errors import BackupdError, CaptureFailed, CommandFailed, ContainerError, RestoreFailed
from backupd.model import (
    Archive,
    Bytes,
    Capture,
    Clock,
    Container,
    ContainerSpec,
    Content,
    Facts,
    Json,
    Problem,
    RecoveryPoint,
    TarStream,
    Tree,
)

if TYPE_CHECKING:
    from backupd.config.models import VolumeSource
    from backupd.sandbox.docker import ContainerInfo, Engine

INSIDE = "/volume"
"""Where a volume is mounted in helpers, and in the container that holds a restored one."""
HELPER_IMAGE = "debian:stable-slim"
_WITH_GNU_TAR = (HELPER_IMAGE, "debian:latest", "python:3.11-slim", "python:3-slim", "ubuntu:latest")
"""Any of these will do, if it is there already: a host may have no way to a registry."""
_ANONYMOUS = re.compile(r"[0-9a-f]{64}")
_CREATE = (
    "tar", "--create", "--format=pax", "--xattrs", "--xattrs-include=*", "--sparse", "--numeric-owner",
    "--one-file-system", "--sort=name", "--warning=no-file-ignored", "--quoting-style=literal", "--directory", INSIDE,
)  # fmt: skip
"""ACLs are among the xattrs; --acls would write them a second time, with the helper's names for numbers."""
_EXTRACT = (
    "tar", "--extract", "--preserve-permissions", "--same-owner", "--numeric-owner", "--xattrs",
    "--xattrs-include=*", "--acls", "--delay-directory-restore", "--warning=no-timestamp", "--directory", INSIDE,
    "--file", "-",
)  # fmt: skip
_LIST = ("find", INSIDE, *LISTING)
_TAR_CHANGED = 1
"""GNU tar's status for "some files changed while they were read"; 2 is a failure."""


class VolumeSettings(NamedTuple):
    """Exactly one of `path` and `volume`. Patterns: see `backupd.archive.patterns`."""

    path: Path | None = None
    volume: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    read_through: str = "auto"
    """`auto`, `path` or `helper`: whether a volume is read where it lies or by a helper container."""
    helper_image: str | None = None


def from_config(source: VolumeSource, engine: Engine) -> VolumeDriver:
    """The driver for a source of the configuration."""
    settings = VolumeSettings(
        source.path, source.volume, source.include, source.exclude, source.read_through, source.helper_image
    )
    return VolumeDriver(settings, engine)


def _utc_now() -> datetime:
    return datetime.now(UTC)


class VolumeDriver:
    """Captures and restores one directory or one Docker volume."""

    kind = "volume"

    def __init__(self, settings: VolumeSettings, engine: Engine, *, clock: Clock = _utc_now) -> None:
        self._settings = settings
        self._engine = engine
        self._clock = clock

    # --- capture

    @contextmanager
    def capture(self, since: RecoveryPoint | None) -> Iterator[Capture]:  # noqa: ARG002  the engine knows
        """Hand out the tree, or a tar of it. Raises CaptureFailed where there is no such place."""
        settings = self._settings
        warnings: list[str] = []
        try:
            root = self._readable_place()
            attributes: dict[str, Json] = {"read_through": "helper" if root is None else "path"}
            attributes |= {"volume": settings.volume} if settings.volume else {"path": str(settings.path)}
            if settings.volume is not None:
                self._refuse_a_wrong_place(settings.volume, root)
        except ContainerError as error:
            raise CaptureFailed(error.message, hint=error.hint) from error
        if root is not None:
            tree = Tree(root, include=settings.include, exclude=settings.exclude)
            yield Capture(tree, self._clock(), attributes=attributes, warnings=warnings)
            return
        with closing(self._tar_by_helper(warnings)) as chunks:
            file = cast("BinaryIO", io.BufferedReader(IteratorFile(chunks), 1 << 20))
            content: Content = TarStream(file, include=settings.include, exclude=settings.exclude)
            yield Capture(content, self._clock(), attributes=attributes, warnings=warnings)

    def _readable_place(self) -> Path | None:
        """Where this process reads the tree; None: a helper must. Raises CaptureFailed, ContainerError."""
        settings = self._settings
        if settings.path is not None:
            problem = _problem_of_path(settings.path)
            if problem is not None:
                raise CaptureFailed(problem.message, hint=problem.hint)
            return settings.path.resolve()
        path = self._engine.volume_path(cast("str", settings.volume))
        if settings.read_through == "helper":
            return None
        if path is None and settings.read_through == "path":
            raise CaptureFailed(
                f"the volume {settings.volume} cannot be read at its path by this process",
                hint='run as root on the engine\'s host, or set read_through = "helper"',
            )
        return path

    def _refuse_a_wrong_place(self, volume: str, root: Path | None) -> None:
        """An empty volume, whose container writes into another that nobody named, is not what is meant.

        postgres:18 did this to everyone: it moved its data one directory up, out of the volume that was
        mounted, into an anonymous one.
        """
        if not self._is_empty(volume, root):
            return
        for user in self._engine.volume_users(volume):
            others = [m for m in user.mounts if m.kind == "volume" and _ANONYMOUS.fullmatch(m.name)]
            if others:
                places = ", ".join(mount.destination for mount in others)
                raise CaptureFailed(
                    f"the volume {volume} is empty, and {user.name}, which mounts it, keeps data in an anonymous "
                    f"volume at {places}",
                    hint=f"mount the volume at {places} instead; if it is meant to be empty, put any file into it",
                )

    def _is_empty(self, volume: str, root: Path | None) -> bool:
        if root is not None:
            with os.scandir(root) as entries:
                return next(entries, None) is None
        return not b"".join(self._helper(("ls", "-A", INSIDE), volume, "ro"))

    def _tar_by_helper(self, warnings: list[str]) -> Generator[bytes]:
        volume = cast("str", self._settings.volume)
        try:
            yield from self._helper((*_CREATE, *excludes_for_tar(self._settings.exclude), "."), volume, "ro")
        except CommandFailed as error:
            if error.returncode != _TAR_CHANGED:
                raise CaptureFailed(
                    f"the volume {volume} could not be read: {error.message}",
                    hint="the helper's image needs GNU tar; name another with helper_image",
                ) from error
            warnings += warnings_of_tar(error.stderr)
        except ContainerError as error:
            raise CaptureFailed(error.message, hint=error.hint) from error

    # --- restore

    def home(self, point: RecoveryPoint) -> ContainerSpec:  # noqa: ARG002  the same for every point
        """A container that only holds the volume. Any image will do; it never runs."""
        return ContainerSpec(
            image=self._settings.helper_image or HELPER_IMAGE,
            volumes=(INSIDE,),
            load_while="stopped",
            service=False,
        )

    def load(self, archive: Archive, container: Container) -> None:
        """Fill the container's volume and compare it with the archive.

        Raises RestoreFailed where the volume holds anything already, or differs afterwards.
        """
        place = self._place_in(container)
        path = container.mount(place)
        volume = None if path is not None else self._volume_at(container, place)
        if not self._holds_nothing(container, place, path):
            raise RestoreFailed(
                f"{place} of {container.name} is not empty",
                hint="a restore never overwrites: give a fresh volume, or remove what is there yourself",
            )
        if path is not None:
            archive.extract(path)
        elif volume is not None:
            self._extract_by_helper(archive, volume)
        else:
            container.write(place, archive.tar())
        expected, found = facts_of(found_in_archive(archive)), self._measure(container, place)
        if expected != found:
            told = ", ".join(
                f"{key} {expected[key]} became {found[key]}"
                for key in expected
                if expected[key] != found[key]
            )
            raise RestoreFailed(
                f"what was restored into {container.name} is not what was captured: {told}",
                hint="look at the free space and the file system of the volume, then restore again",
            )

    def _extract_by_helper(self, archive: Archive, volume: str) -> None:
        try:
            for _ in self._helper(_EXTRACT, volume, "rw", stdin=archive.tar()):
                pass
        except CommandFailed as error:
            raise RestoreFailed(
                f"the volume {volume} could not be written: {error.message}",
                hint="what is there now is incomplete: remove the volume, mend the cause, and restore again",
            ) from error

    def facts(self, container: Container) -> Facts:
        """Entries by type, bytes, and a digest over all names, types and sizes of the restored tree."""
        return self._measure(container, self._place_in(container))

    def _measure(self, container: Container, place: str) -> Facts:
        path = container.mount(place)
        if path is not None:
            return facts_of(found_below(path))
        volume = self._volume_at(container, place)
        if volume is not None:
            return facts_of(found_in_listing(self._helper(_LIST, volume, "ro")))
        return facts_of(found_in_tar(container.read(place)))

    def _place_in(self, container: Container) -> str:
        """Where in this container the tree belongs: in one made for it, in one that mounts our volume or path."""
        info = self._info(container)
        if info is None:
            return INSIDE
        writable = [mount for mount in info.mounts if mount.writable and mount.kind in ("volume", "bind")]
        ours = [
            mount.destination
            for mount in writable
            if mount.destination == INSIDE
            or (mount.name and mount.name == self._settings.volume)
            or (self._settings.path is not None and mount.source == str(self._settings.path))
        ]
        places = ours or [mount.destination for mount in writable]
        if len(places) != 1:
            there = f"it has {', '.join(places)}" if places else "it has none"
            raise RestoreFailed(
                f"it is not clear which volume of {container.name} to restore into: {there}",
                hint=f"make one with `docker create -v NAME:{INSIDE} {HELPER_IMAGE}`",
            )
        return places[0]

    def _volume_at(self, container: Container, place: str) -> str | None:
        """The name of the volume mounted there, when there is a helper that can fill it."""
        info = self._info(container)
        mounted = [m for m in info.mounts if m.destination == place and m.kind == "volume"] if info else []
        if not mounted:
            return None
        try:
            self._engine.ensure_image(self._image())
        except ContainerError:
            return None  # the engine's own untar does it then, without holes
        return mounted[0].name

    def _info(self, container: Container) -> ContainerInfo | None:
        return next((info for info in self._engine.containers() if info.name == container.name), None)

    def _holds_nothing(self, container: Container, place: str, path: Path | None) -> bool:
        if path is not None:
            with os.scandir(path) as entries:
                return next(entries, None) is None
        return next(found_in_tar(container.read(place)), None) is None

    # --- helpers

    def _helper(
        self, argv: Sequence[str], volume: str, mode: str, *, stdin: Iterable[Bytes] | None = None
    ) -> Iterator[bytes]:
        return self._engine.run_helper(self._image(), argv, volumes={volume: (INSIDE, mode)}, stdin=stdin)

    def _image(self) -> str:
        """The configured one; else the agent's own, which is there; else one that is; else one to be pulled."""
        if self._settings.helper_image:
            return self._settings.helper_image
        if Path("/.dockerenv").exists() or Path("/run/.containerenv").exists():
            try:
                return self._engine.container(os.uname().nodename).image
            except ContainerError:
                pass  # a container of another engine
        return next((image for image in _WITH_GNU_TAR if self._engine.image_present(image)), HELPER_IMAGE)

    # --- check

    def check(self) -> Sequence[Problem]:
        """Is the place there, readable, and the one that is meant? Touches nothing."""
        settings = self._settings
        problems = [*_problems_of_patterns(settings)]
        if settings.path is not None:
            problem = _problem_of_path(settings.path)
            return [*problems, problem] if problem else [*problems, *_problem_of_emptiness(settings.path)]
        volume = cast("str", settings.volume)
        try:
            root = self._readable_place()
            if root is None:
                image = self._image()
                if not self._engine.image_present(image):
                    hint = "it is pulled when it is needed; helper_image names another"
                    problems.append(Problem(f"the helper's image {image} is not here yet", hint, fatal=False))
                    return problems
            self._refuse_a_wrong_place(volume, root)
            if root is not None:
                problems += _problem_of_emptiness(root)
        except BackupdError as error:
            problems.append(Problem(error.message, error.hint))
        return problems


# --- what is wrong with a place ----------------------------------------------------------------------------


def _problem_of_path(path: Path) -> Problem | None:
    if not path.exists():
        return Problem(
            f"there is no {path}", "correct the source's path; in a container, mount the directory there"
        )
    if not path.is_dir():
        return Problem(
            f"{path} is no directory", "give the directory that holds it, and include = the file's name"
        )
    if not os.access(path, os.R_OK | os.X_OK):
        return Problem(
            f"this user may not read {path}",
            "run the agent as root or as its owner, or give it CAP_DAC_READ_SEARCH",
        )
    return None


def _problem_of_emptiness(path: Path) -> list[Problem]:
    with os.scandir(path) as entries:
        if next(entries, None) is not None:
            return []
    return [Problem(f"{path} is empty", "is it the right place, and mounted?", fatal=False)]


def _problems_of_patterns(settings: VolumeSettings) -> Iterator[Problem]:
    """A pattern is relative to the root of the tree; one with the host's whole path matches nothing."""
    for pattern in (*settings.include, *settings.exclude):
        if settings.path is not None and PurePosixPath(pattern).is_relative_to(settings.path):
            relative = PurePosixPath(pattern).relative_to(settings.path)
            yield Problem(
                f"the pattern {pattern} is compared with paths below {settings.path} and matches nothing",
                f"write /{relative}",
            )


def excludes_for_tar(patterns: Iterable[str]) -> Iterator[str]:
    """The patterns that GNU tar can say, as its options: what is left out there need not travel, and tar stores
    a file with several names under one that is kept. The engine applies all of them, once more.

    A directory that is excluded is itself still sent, without what is in it.
    """
    yield from ("--wildcards", "--no-wildcards-match-slash")
    for pattern in patterns:
        only_below = pattern.endswith(("/", "/**"))
        text = pattern.removesuffix("/").removesuffix("/**").removeprefix("./")
        anywhere = text.startswith("**/") or "/" not in pattern.rstrip("/")
        text = text.removeprefix("**/").strip("/")
        if not text or "**" in text.split("/") or "//" in text or "/./" in text:
            continue
        yield "--no-anchored" if anywhere else "--anchored"
        yield f"--exclude={'' if anywhere else './'}{text}{'/*' if only_below else ''}"


def warnings_of_tar(stderr: str) -> list[str]:
    """What GNU tar says of files that changed, in our words; names are relative to the root."""
    warnings: list[str] = []
    for line in stderr.splitlines():
        text = line.removeprefix("tar: ").strip()
        if not text or text.startswith(("Exiting with", "Removing leading")):
            continue
        name, separator, what = text.removeprefix("./").rpartition(": ")
        told = next((ours for theirs, ours in _TAR_SAYS if theirs in what), None)
        warnings.append(f"{name}: {told}" if separator and told else text)
    return warnings or ["files changed while they were read; tar did not say which"]


_TAR_SAYS = (
    ("file changed as we read it", "changed while it was read"),
    ("removed before we read it", "vanished while the tree was read"),
    ("file is removed", "vanished while the tree was read"),
    ("padding with zeros", "shrank while it was read; zeros stand for the rest"),
)
