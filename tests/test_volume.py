"""Directories and Docker volumes: captured and restored as they were, while they change, through real containers."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import docker
import pytest
from services import Services
from trees import Entry, describe, differences, make_beyond_path_max, make_every_kind

from backupd.archive import PointArchive, open_archive
from backupd.backup import back_up
from backupd.drivers.volume import INSIDE, VolumeDriver, VolumeSettings, warnings_of_tar
from backupd.drivers.volume_facts import facts_of, found_below, found_in_archive
from backupd.errors import CaptureFailed, RestoreFailed
from backupd.model import MemberType, Run, RunStatus, Silence
from backupd.repository import Repository
from backupd.sandbox.docker import DockerSandbox, Engine
from backupd.stores.memory import MemoryStore

HELPER = "python:3.11-slim"  # in the test bed, and with GNU tar


def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def repository() -> Repository:
    return Repository.create(MemoryStore(), clock=now)


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("every") / "kind"
    make_every_kind(root)
    yield root
    shutil.rmtree(root)


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine()
    yield made
    made.close()


def of_path(path: Path, *, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> VolumeDriver:
    return VolumeDriver(VolumeSettings(path=path, include=include, exclude=exclude), Engine())


def backed_up(driver: VolumeDriver, repository: Repository) -> Run:
    return back_up(
        "data", driver, repository, clock=now, progress=Silence(), stop=threading.Event(), allow_shrink=True
    )


def point_of(run: Run, repository: Repository) -> PointArchive:
    return open_archive(repository, repository.find(run.point))


# --- a directory -----------------------------------------------------------------------------------------


def test_every_kind_of_entry_comes_back(every_kind: Path, repository: Repository, tmp_path: Path) -> None:
    """Links, attributes, ACLs, holes, odd names, owners, times, devices: nothing differs."""
    run = backed_up(of_path(every_kind), repository)
    assert (run.status, run.warnings) == (RunStatus.OK, ())
    point_of(run, repository).extract(tmp_path / "back")
    assert differences(describe(every_kind), describe(tmp_path / "back")) == []


def test_every_kind_of_entry_comes_back_as_tar(
    every_kind: Path, repository: Repository, tmp_path: Path
) -> None:
    """The same by `export` and GNU tar."""
    run = backed_up(of_path(every_kind), repository)
    argv = ["tar", "-xp", "--numeric-owner", "--xattrs", "--xattrs-include=*", "--acls", "-C", str(tmp_path)]
    tar = b"".join(point_of(run, repository).tar())
    subprocess.run(argv, input=tar, check=True, stderr=subprocess.DEVNULL)
    assert differences(describe(every_kind), describe(tmp_path)) == []


def test_an_unchanged_tree_stores_next_to_nothing(every_kind: Path, repository: Repository) -> None:
    """The second run takes over what the first one wrote, hard links and holes too."""
    first = backed_up(of_path(every_kind), repository)
    second = backed_up(of_path(every_kind), repository)
    assert second.size == first.size
    assert second.stored < first.stored // 20
    assert facts_of(found_in_archive(point_of(second, repository))) == facts_of(found_below(every_kind))


def test_a_file_with_three_names_is_stored_once(tmp_path: Path, repository: Repository) -> None:
    """Hard links are not doubled, neither in the repository nor after the restore."""
    root = tmp_path / "data"
    root.mkdir()
    (root / "one").write_bytes(os.urandom(2_000_000))
    os.link(root / "one", root / "two")
    os.link(root / "one", root / "three")
    run = backed_up(of_path(root), repository)
    assert run.size == 2_000_000
    assert run.stored < 2_100_000
    point_of(run, repository).extract(tmp_path / "back")
    assert (tmp_path / "back" / "one").stat().st_nlink == 3


def test_paths_longer_than_the_kernel_takes_come_back(tmp_path: Path, repository: Repository) -> None:
    """4,096 bytes is the limit of one call, not of a tree."""
    try:
        make_beyond_path_max(tmp_path / "deep")
        run = backed_up(of_path(tmp_path / "deep"), repository)
        assert run.warnings == ()
        point_of(run, repository).extract(tmp_path / "back")
        assert differences(describe(tmp_path / "deep"), describe(tmp_path / "back")) == []
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "deep", tmp_path / "back"], check=True)


def test_includes_and_excludes_choose(tmp_path: Path, repository: Repository) -> None:
    """What is excluded is in no point; what is included brings the directories on its way."""
    root = tmp_path / "data"
    for name in ("keep/a.txt", "keep/b.tmp", "cache/big", "docs/deep/c.txt", "d.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    run = backed_up(of_path(root, exclude=("*.tmp", "/cache/")), repository)
    assert names_in(point_of(run, repository)) == {
        "keep",
        "keep/a.txt",
        "docs",
        "docs/deep",
        "docs/deep/c.txt",
        "d.txt",
    }
    run = backed_up(of_path(root, include=("docs/**/*.txt",)), repository)
    assert names_in(point_of(run, repository)) == {"docs", "docs/deep", "docs/deep/c.txt"}


def names_in(archive: PointArchive) -> set[str]:
    return {member.name for member in archive.members()} - {""}


def test_a_file_system_without_attributes_is_read(
    tmp_path: Path, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS 3, and the directories that Docker Desktop shares, answer "not supported"; every file is there still."""

    def none(*_: object, **__: object) -> list[str]:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    (tmp_path / "file").write_text("content")
    (tmp_path / "link").symlink_to("file")
    monkeypatch.setattr(os, "listxattr", none)
    run = backed_up(of_path(tmp_path), repository)
    assert run.warnings == ()
    assert names_in(point_of(run, repository)) == {"file", "link"}


def test_what_is_mounted_inside_is_left_out_and_told(tmp_path: Path, repository: Repository) -> None:
    """A volume below the directory is another source; excluding it says that one knows."""
    inside = tmp_path / "uploads"
    inside.mkdir()
    (tmp_path / "file").write_text("content")
    subprocess.run(["mount", "-t", "tmpfs", "none", inside], check=True)
    try:
        (inside / "photo").write_text("photo")
        run = backed_up(of_path(tmp_path), repository)
        assert run.warnings == ("uploads: another file system is mounted here: what is in it was left out",)
        assert names_in(point_of(run, repository)) == {"file", "uploads"}
        assert backed_up(of_path(tmp_path, exclude=("/uploads/",)), repository).warnings == ()
    finally:
        subprocess.run(["umount", inside], check=True)


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_place_that_is_none_fails_with_a_hint(kind: str, tmp_path: Path, repository: Repository) -> None:
    """Before anything is written."""
    place = tmp_path / "place"
    if kind == "file":
        place.write_text("a file")
    with pytest.raises(CaptureFailed) as caught:
        backed_up(of_path(place), repository)
    assert str(place) in caught.value.message
    assert caught.value.hint
    assert repository.points() == []
    assert [problem.fatal for problem in of_path(place).check()] == [True]


def test_check_tells_of_patterns_that_match_nothing_and_of_an_empty_place(tmp_path: Path) -> None:
    """Whole paths of the host are the usual mistake."""
    problems = of_path(tmp_path, exclude=(f"{tmp_path}/cache",)).check()
    assert problems[0].hint == "write /cache"
    assert "is empty" in problems[1].message
    assert not problems[1].fatal


# --- while it changes ------------------------------------------------------------------------------------


@pytest.fixture
def changing(tmp_path: Path) -> Path:
    """Files enough for the first to be read long before the last."""
    root = tmp_path / "data"
    for number in range(400):
        path = root / f"d{number // 40:02d}" / f"f{number:03d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number % 256]) * 10_000)
    return root


def when_opened(monkeypatch: pytest.MonkeyPatch, trigger: str, meddle: Callable[[], None]) -> None:
    """Run `meddle` once, just before the file named `trigger` is opened, as a busy application would."""
    real = os.open
    done: list[bool] = []

    def opened(path: object, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path == trigger and not done:
            done.append(True)
            meddle()
        return real(path, flags, mode, dir_fd=dir_fd)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", opened)


def test_files_that_vanish_and_grow_and_shrink_are_named_and_the_rest_is_whole(
    changing: Path, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that changes must not abort everything."""
    large = changing / "z-large"
    large.write_bytes(os.urandom(5_000_000))
    before = describe(changing)

    def meddle() -> None:
        (changing / "d00" / "f020").unlink()
        os.truncate(changing / "d00" / "f021", 10)
        with open(changing / "d00" / "f022", "ab") as file:
            file.write(b"more")
        shutil.rmtree(changing / "d09")

    when_opened(monkeypatch, "f010", meddle)
    run = backed_up(of_path(changing), repository)
    monkeypatch.undo()
    assert run.status is RunStatus.WARNED
    told = " ".join(run.warnings)
    assert "d00/f020" in told
    assert "d09" in told
    point_of(run, repository).extract(tmp_path / "back")
    after = describe(tmp_path / "back")
    touched = ("d00/f020", "d00/f021", "d00/f022", "d09")
    for path, entry in before.items():
        if not path.startswith(touched) and entry["type"] != "d":
            assert after[path] == entry
    assert (tmp_path / "back" / "d00" / "f021").stat().st_size == 10
    assert (tmp_path / "back" / "d00" / "f022").stat().st_size == 10_004


def test_a_file_that_never_stands_still_is_kept_and_named(tmp_path: Path, repository: Repository) -> None:
    """A log that is written to all the time: what was there is kept, and the run says so."""
    root = tmp_path / "data"
    root.mkdir()
    (root / "still").write_bytes(b"still")
    log = root / "busy.log"
    log.write_bytes(b"x" * 30_000_000)
    stop = threading.Event()

    def write() -> None:
        with open(log, "ab", buffering=0) as file:
            while not stop.wait(0.001):
                file.write(b"line\n")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        run = backed_up(of_path(root), repository)
    finally:
        stop.set()
        writer.join()
    assert run.status is RunStatus.WARNED
    assert any("busy.log" in warning for warning in run.warnings)
    point_of(run, repository).extract(tmp_path / "back")
    assert (tmp_path / "back" / "still").read_bytes() == b"still"
    assert (tmp_path / "back" / "busy.log").read_bytes().startswith(b"x" * 30_000_000)


# --- a Docker volume ---------------------------------------------------------------------------------------


def fill(volume: str, client: docker.DockerClient, root: Path) -> Path:
    """Copy a tree into a volume."""
    mountpoint = Path(client.volumes.get(volume).attrs["Mountpoint"])
    subprocess.run(["cp", "-a", f"{root}/.", str(mountpoint)], check=True)
    return mountpoint


def of_volume(volume: str, engine: Engine, through: str = "auto") -> VolumeDriver:
    return VolumeDriver(VolumeSettings(volume=volume, read_through=through, helper_image=HELPER), engine)


@pytest.mark.parametrize("through", ["path", "helper"])
def test_a_volume_with_every_kind_of_entry_comes_back(
    through: str,
    every_kind: Path,
    services: Services,
    docker_client: docker.DockerClient,
    engine: Engine,
    repository: Repository,
    tmp_path: Path,
) -> None:
    """Read where it lies, and read by a helper: the same."""
    volume = services.volume()
    mountpoint = fill(volume, docker_client, every_kind)
    run = backed_up(of_volume(volume, engine, through), repository)
    assert (run.status, run.warnings) == (RunStatus.OK, ())
    assert repository.find(run.point).attributes["read_through"] == through
    point_of(run, repository).extract(tmp_path / "back")
    expected = describe(mountpoint)
    if through == "helper":
        forget_trusted(expected)
    assert differences(expected, describe(tmp_path / "back")) == []


def forget_trusted(entries: dict[str, Entry]) -> None:
    """Attributes that begin with `trusted.` are shown to nobody in an ordinary container."""
    for entry in entries.values():
        attributes = cast("dict[str, bytes]", entry["xattrs"])
        entry["xattrs"] = {key: value for key, value in attributes.items() if not key.startswith("trusted.")}


def forget_what_untar_loses(entries: dict[str, Entry]) -> None:
    """The engine's own untar: no holes, no attribute that is empty or has `=` in its name, no time before 1970
    or after 2262, none for the volume itself."""
    for path in ("times/1969", "times/1901", "times/2300", "."):
        entries[path].pop("mtime")
    for path in ("attributes/plain", "attributes/linked"):
        attributes = cast("dict[str, bytes]", entries[path]["xattrs"])
        entries[path]["xattrs"] = {
            key: attributes[key] for key in ("user.note", "user.binary", "trusted.overlay")
        }
    for entry in entries.values():
        entry.pop("sparse", None)


class FarAway(Engine):
    """An engine whose volumes this process cannot reach, as an agent in a container sees it."""

    is_local = False


@pytest.mark.parametrize("helper", [HELPER, "no.such.registry.invalid/image:1"])
@pytest.mark.parametrize("near", [True, False])
def test_a_point_is_restored_into_a_fresh_container(
    near: bool, helper: str, every_kind: Path, repository: Repository, docker_client: docker.DockerClient
) -> None:
    """By the volume's path, by a helper, and, where no helper is to be had, by the engine's own untar."""
    run = backed_up(of_path(every_kind), repository)
    archive = point_of(run, repository)
    engine = Engine() if near else FarAway()
    driver = VolumeDriver(VolumeSettings(path=every_kind, helper_image=helper), engine)
    sandbox = DockerSandbox(engine, f"test-{os.urandom(4).hex()}", labels={"backupd.test": "1"})
    try:
        container = sandbox.create("data", driver.home(archive.point))
        driver.load(archive, container)
        assert driver.facts(container) == facts_of(found_below(every_kind))
        place = Engine().container(container.name).mount(INSIDE)
        assert place is not None
        before, after = describe(every_kind), describe(place)
        if not near:
            forget = forget_trusted if helper == HELPER else forget_what_untar_loses
            forget(before)
            forget(after)
        assert differences(before, after) == []
        with pytest.raises(RestoreFailed, match="not empty"):
            driver.load(archive, container)
    finally:
        sandbox.destroy()
        engine.close()


def test_a_restore_that_lost_a_file_is_no_success(
    every_kind: Path, repository: Repository, engine: Engine
) -> None:
    """Success is said only of what was compared."""
    archive = point_of(backed_up(of_path(every_kind), repository), repository)

    class Lossy(PointArchive):
        def extract(self, into: Path) -> None:
            super().extract(into)
            (into / "many" / "0" / "file-000.txt").unlink()

    lossy = Lossy(repository, repository.manifest(archive.point))
    driver = VolumeDriver(VolumeSettings(path=every_kind, helper_image=HELPER), engine)
    sandbox = DockerSandbox(engine, f"test-{os.urandom(4).hex()}", labels={"backupd.test": "1"})
    try:
        container = sandbox.create("data", driver.home(archive.point))
        with pytest.raises(RestoreFailed, match="is not what was captured: entries"):
            driver.load(lossy, container)
    finally:
        sandbox.destroy()


def test_an_existing_container_is_filled_where_it_mounts_the_volume(
    services: Services,
    engine: Engine,
    repository: Repository,
    docker_client: docker.DockerClient,
    tmp_path: Path,
) -> None:
    """`--to container:NAME`: its only volume, wherever that is mounted; unclear ones are refused."""
    (tmp_path / "file").write_text("content")
    archive = point_of(backed_up(of_path(tmp_path), repository), repository)
    driver = VolumeDriver(VolumeSettings(path=tmp_path, helper_image=HELPER), engine)
    one, other = services.volume(), services.volume()
    fresh = services.container(HELPER, ["true"], volumes={one: "/srv/data"}, start=False)
    driver.load(archive, engine.container(fresh.name))
    assert (Path(docker_client.volumes.get(one).attrs["Mountpoint"]) / "file").read_text() == "content"
    unclear = services.container(HELPER, ["true"], volumes={one: "/a", other: "/b"}, start=False)
    with pytest.raises(RestoreFailed, match="not clear which"):
        driver.load(archive, engine.container(unclear.name))


@pytest.fixture
def linked(services: Services, docker_client: docker.DockerClient) -> str:
    """A volume with a file of three names, the first two in a/."""
    volume = services.volume()
    root = Path(docker_client.volumes.get(volume).attrs["Mountpoint"])
    for name in (
        "a/keep.txt",
        "a/drop.tmp",
        "b/other.txt",
        "b/a/deep",
        "cache/x/y",
        "d/cache",
        "e/logs/1.log",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    for name in ("a/first.tmp", "b/second.txt"):
        os.link(root / "a" / "keep.txt", root / name)
    return volume


@pytest.mark.parametrize(
    "exclude",
    [
        ("*.tmp", "keep.txt"), ("a/",), ("/a",), ("./a/",), ("a/**",), ("**/a/*.t*",), ("cache/",), ("/cache/",),
        ("/cache/x",), ("**/cache",), ("e/**/1.log",), ("[ab]",), ("logs/**",), ("e/logs/**",), ("**",), ("d/c?che",),
    ],
)  # fmt: skip
def test_excludes_mean_the_same_behind_a_helper(
    exclude: tuple[str, ...], linked: str, engine: Engine, repository: Repository
) -> None:
    """And a file stays whole when the first of its names is left out."""
    found = []
    for through in ("path", "helper"):
        settings = VolumeSettings(volume=linked, read_through=through, helper_image=HELPER, exclude=exclude)
        run = backed_up(VolumeDriver(settings, engine), repository)
        archive = point_of(run, repository)
        content = {
            member.name: b"".join(archive.read(member.name))
            for member in archive.members()
            if member.type in (MemberType.FILE, MemberType.HARDLINK)
        }
        found.append((run.warnings, names_in(archive), content))
    assert found[0] == found[1]


def test_a_file_whose_content_came_under_an_excluded_name_is_told(
    linked: str, engine: Engine, repository: Repository
) -> None:
    """Includes are not known to tar: a name without content is left out of the point and named, never kept empty."""
    settings = VolumeSettings(volume=linked, read_through="helper", helper_image=HELPER, include=("/b",))
    run = backed_up(VolumeDriver(settings, engine), repository)
    assert run.warnings == ("b/second.txt: left out: its content came as a/first.tmp, which is excluded",)
    assert names_in(point_of(run, repository)) == {"b", "b/a", "b/a/deep", "b/other.txt"}


def test_a_volume_that_changes_under_the_helper_warns(
    services: Services, engine: Engine, repository: Repository, docker_client: docker.DockerClient
) -> None:
    """tar's status 1 is a warning that names the files, not a failure."""
    volume = services.volume()
    mountpoint = Path(docker_client.volumes.get(volume).attrs["Mountpoint"])
    (mountpoint / "still").write_bytes(b"still")
    log = mountpoint / "busy.log"
    log.write_bytes(os.urandom(60_000_000))
    stop = threading.Event()

    def write() -> None:
        with open(log, "ab", buffering=0) as file:
            while not stop.wait(0.001):
                file.write(b"line\n")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        run = backed_up(of_volume(volume, engine, "helper"), repository)
    finally:
        stop.set()
        writer.join()
    assert run.status is RunStatus.WARNED
    assert run.warnings == ("busy.log: changed while it was read",)
    assert b"".join(point_of(run, repository).read("still")) == b"still"


def test_a_helper_that_cannot_read_makes_no_point(
    services: Services, repository: Repository, docker_client: docker.DockerClient
) -> None:
    """A short tar is never a recovery point."""

    class Killing(Engine):
        def run_helper(self, image, argv, *, volumes, stdin=None, progress=None):  # type: ignore[no-untyped-def]
            if argv[0] == "tar":  # ends well before the archive does
                argv = ("sh", "-c", f"{' '.join(argv)} | head -c 100000; exit 2")
            return super().run_helper(image, argv, volumes=volumes, stdin=stdin, progress=progress)

    volume = services.volume()
    mountpoint = Path(docker_client.volumes.get(volume).attrs["Mountpoint"])
    (mountpoint / "data").write_bytes(os.urandom(1_000_000))
    with pytest.raises(CaptureFailed, match="could not be read"):
        backed_up(of_volume(volume, Killing(), "helper"), repository)
    assert repository.points() == []


def test_a_volume_that_is_not_there_fails_and_is_not_made(engine: Engine, repository: Repository) -> None:
    """The engine would make it, and its emptiness would be backed up."""
    name = "backupd-test-no-such-volume"
    for through in ("auto", "path", "helper"):
        with pytest.raises(CaptureFailed, match=name):
            backed_up(of_volume(name, engine, through), repository)
    assert [problem.fatal for problem in of_volume(name, engine).check()] == [True]
    with pytest.raises(docker.errors.NotFound):
        docker.from_env().volumes.get(name)


@pytest.mark.parametrize("through", ["path", "helper"])
def test_an_empty_volume_beside_an_anonymous_one_is_the_wrong_place(
    through: str, services: Services, engine: Engine, repository: Repository
) -> None:
    """postgres:18 keeps its data one directory above the volume that everyone had mounted."""
    volume = services.volume()
    made = docker.from_env().api.create_container(
        HELPER, ["true"], volumes=["/var/lib/postgresql"], labels={"backupd.test": "1"},
        host_config=docker.from_env().api.create_host_config(binds={volume: {"bind": "/var/lib/postgresql/data"}}),
    )  # fmt: skip
    try:
        with pytest.raises(CaptureFailed) as caught:
            backed_up(of_volume(volume, engine, through), repository)
        assert "/var/lib/postgresql" in caught.value.message
        assert "mount the volume at /var/lib/postgresql" in caught.value.hint
        assert any(problem.fatal for problem in of_volume(volume, engine, through).check())
    finally:
        docker.from_env().api.remove_container(made["Id"], v=True, force=True)


def test_what_tar_says_becomes_warnings() -> None:
    """Names relative to the root; a colon in a name is no separator."""
    said = (
        "tar: ./a/b: file changed as we read it\n"
        "tar: ./c: d: File removed before we read it\n"
        "tar: ./e: File shrank by 17 bytes; padding with zeros\n"
        "tar: Exiting with failure status due to previous errors\n"
        "tar: something new\n"
    )
    assert warnings_of_tar(said) == [
        "a/b: changed while it was read",
        "c: d: vanished while the tree was read",
        "e: shrank while it was read; zeros stand for the rest",
        "something new",
    ]
    assert len(warnings_of_tar("")) == 1
