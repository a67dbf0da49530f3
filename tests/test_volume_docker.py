"""Docker volumes: read in place or by a helper container, restored into fresh containers; all through a real engine."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import docker
import pytest
from services import Services
from trees import Entry, describe, differences, make_every_kind
from volumes import backed_up, names_in, now, of_path, point_of

from backupd.archive import PointArchive
from backupd.drivers.volume import INSIDE, VolumeDriver, VolumeSettings, warnings_of_tar
from backupd.drivers.volume_facts import facts_of, found_below
from backupd.errors import CaptureFailed, RestoreFailed
from backupd.model import MemberType, RunStatus
from backupd.repository import Repository
from backupd.sandbox.docker import DockerSandbox, Engine
from backupd.stores.memory import MemoryStore

HELPER = "python:3.11-slim"  # in the test bed, and with GNU tar


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
        def extract(self, into: Path) -> list[str]:
            warnings = super().extract(into)
            (into / "many" / "0" / "file-000.txt").unlink()
            return warnings

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
        ("*.tmp", "keep.txt"), ("a/", "e/logs/**"), ("./a/", "logs/**"), ("/a", "d/c?che"), ("a/**", "/cache/x"),
        ("**/a/*.t*", "cache/"), ("/cache/", "e/**/1.log"), ("**/cache", "[ab]"), ("**",),
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
