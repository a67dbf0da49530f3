"""The store in a local directory: crashes, disks that go away, file systems that cannot do everything."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import services as bed

from backupd.errors import Locked, ObjectExists, ObjectMissing, RepositoryMissing, StoreError
from backupd.stores import LocalStore, open_store


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "repository"


@pytest.fixture
def store(root: Path) -> LocalStore:
    return LocalStore(root, create=True)


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A directory of root's that everybody may read, and this thread of work not being root."""
    if os.geteuid() != 0:
        pytest.fail("these tests run as root: they become somebody else")
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="backupd-test-"))
    folder.chmod(0o755)
    yield folder
    os.seteuid(0)
    shutil.rmtree(folder)


def keys(store: LocalStore, prefix: str = "") -> list[str]:
    return [info.key for info in store.list(prefix)]


def files(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


# --- crashes ---------------------------------------------------------------------------------------------

WRITER = """
import os, stat, sys, time
from backupd.stores import LocalStore
real_link, real_fsync = os.link, os.fsync
def stop(*args):
    print("now", flush=True)
    time.sleep(60)
def fsync(file):
    if stat.S_ISREG(os.fstat(file).st_mode): stop()
    real_fsync(file)
def link(*args):
    real_link(*args)
    stop()
if sys.argv[2] == "before the name": os.fsync = fsync
if sys.argv[2] == "after the name": os.link = link
LocalStore(sys.argv[1]).put("packs/a/0001.zst", b"x" * 1_000_000)
"""


def killed_writer(root: Path, where: str) -> subprocess.Popen[str]:
    """Start a put in another process and let it come to the point where it is to be killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(root), where],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=bed.die_with_parent,  # noqa: PLW1509  one prctl; no lock is taken
    )
    assert process.stdout and process.stdout.readline() == "now\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_put_killed_before_its_name_leaves_nothing(store: LocalStore, root: Path) -> None:
    """SIGKILL with all bytes written but no name yet: not listed, not got, and the key is free."""
    kill(killed_writer(root, "before the name"))
    assert keys(store) == []
    with pytest.raises(ObjectMissing):
        store.get("packs/a/0001.zst")
    assert len(files(root)) == 1  # the stray that the next lease sweeps
    store.put("packs/a/0001.zst", b"again")
    assert store.get("packs/a/0001.zst") == b"again"


def test_a_put_killed_after_its_name_is_whole(store: LocalStore, root: Path) -> None:
    """SIGKILL after the name was given: the whole object is there, and nothing else is listed."""
    kill(killed_writer(root, "after the name"))
    assert keys(store) == ["packs/a/0001.zst"]
    assert store.get("packs/a/0001.zst") == b"x" * 1_000_000


def test_what_killed_writers_left_is_swept_by_the_next_lease(store: LocalStore, root: Path) -> None:
    """Strays older than an hour go; one that a living process writes, however old it looks, stays."""
    kill(killed_writer(root, "before the name"))
    living = killed_writer(root, "before the name")
    fresh = root / "packs/a/+tmp-fresh"
    fresh.write_bytes(b"")
    for path in root.rglob("+tmp-*"):
        if path != fresh:
            os.utime(path, (1, 1))
    with store.lease("leases/prune.json"):
        left = list(root.rglob("+tmp-*"))
    assert len(left) == 2 and fresh in left
    kill(living)
    assert store.sweep(older_than=3600) == 1


def test_bytes_are_synced_before_they_get_their_name(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync of the file, then the name, then fsync of the directory: the order that survives a power cut."""
    done: list[str] = []
    fsync, link = os.fsync, os.link

    def noted_fsync(file: int) -> None:
        fsync(file)
        done.append("sync directory" if stat.S_ISDIR(os.fstat(file).st_mode) else "sync file")

    def noted_link(source: Path, target: Path) -> None:
        link(source, target)
        done.append("name")

    store.put("a/0", b"")
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "link", noted_link)
    store.put("a/1", b"1")
    assert done == ["sync file", "name", "sync directory"]
    done.clear()
    store.put("b/c/1", b"1")
    assert done == ["sync directory"] * 2 + ["sync file", "name", "sync directory"]


@pytest.mark.parametrize("failing", ["fsync", "link", "write"])
def test_a_put_that_fails_leaves_nothing(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """An I/O error at any step: StoreError, no object, no temporary file."""
    store.put("a/0", b"")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(os, failing, fail)
        with pytest.raises(StoreError, match="input/output error") as caught:
            store.put("a/1", b"1")
    assert "disk" in caught.value.hint
    assert files(root) == ["a/0"]


def test_a_name_that_cannot_be_synced_is_taken_back(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step fails: the put says so, and the object is not there."""
    store.put("a/0", b"")
    fsync = os.fsync

    def fail_for_directories(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(file)

    monkeypatch.setattr(os, "fsync", fail_for_directories)
    with pytest.raises(StoreError):
        store.put("a/1", b"1")
    assert files(root) == ["a/0"]


# --- directories that are not what they were ---------------------------------------------------------------


def test_a_missing_directory_is_never_made_in_silence(root: Path) -> None:
    """Only `create` makes it; without, it is an error that thinks of unmounted disks."""
    with pytest.raises(RepositoryMissing, match="no directory") as caught:
        open_store(str(root))
    assert "mount" in caught.value.hint and caught.value.exit_code == 10
    assert not root.exists()
    open_store(str(root), create=True).put("a", b"1")
    assert open_store(str(root)).get("a") == b"1"


def test_a_directory_that_vanishes_is_an_error_not_an_empty_store(store: LocalStore, root: Path) -> None:
    """Nothing is said to be missing, nothing is listed short, nothing is made again."""
    store.put("packs/a", b"1")
    root.rename(root.with_name("elsewhere"))
    for call in (
        lambda: store.get("packs/a"),
        lambda: store.stat("packs/a"),
        lambda: keys(store),
        lambda: store.put("packs/b", b"1"),
        lambda: store.delete("packs/a"),
        lambda: store.lease("leases/a").__enter__(),
    ):
        with pytest.raises(StoreError, match="cannot") as caught:
            call()
        assert not isinstance(caught.value, ObjectMissing)
        assert caught.value.hint
    assert not root.exists()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """A small disk at tmp_path/disk; call to mount it again. Fails where nothing can be mounted."""
    point = tmp_path / "disk"
    kept = tmp_path / "kept"
    for folder in (point, kept):
        folder.mkdir()

    def mount() -> None:
        subprocess.run(["mount", "--bind", kept, point], check=True)

    mount()
    yield mount
    subprocess.run(["umount", point], check=False, capture_output=True)


def test_a_disk_unmounted_while_we_work_is_noticed(tmp_path: Path, disk: Callable[[], None]) -> None:
    """Its empty mount point is neither an empty repository nor a place to write to; mounted again, work goes on."""
    root = tmp_path / "disk"
    store = LocalStore(root)
    store.put("packs/a", b"1")
    subprocess.run(["umount", root], check=True)
    for call in (lambda: keys(store), lambda: store.put("packs/b", b"2"), lambda: store.get("packs/a")):
        with pytest.raises(StoreError, match="not the directory it was") as caught:
            call()
        assert "mount" in caught.value.hint
    assert list(root.iterdir()) == []
    disk()
    assert store.get("packs/a") == b"1"
    store.put("packs/b", b"2")
    assert keys(store) == ["packs/a", "packs/b"]


def test_a_disk_unmounted_during_a_list_fails_it(tmp_path: Path, disk: Callable[[], None]) -> None:
    """What was seen is not all there is: the list ends with an error, not early."""
    root = tmp_path / "disk"
    store = LocalStore(root)
    for key in ("a/1", "b/1", "c/1"):
        store.put(key, b"")
    listing = store.list()
    assert next(listing).key == "a/1"
    subprocess.run(["umount", root], check=True)
    with pytest.raises(StoreError, match="not the directory it was"):
        list(listing)


def test_a_link_that_leads_nowhere_fails_the_list(store: LocalStore, root: Path, tmp_path: Path) -> None:
    """packs/ on another disk that is not mounted: the list raises, it is not short."""
    other = tmp_path / "other-disk"
    other.mkdir()
    (root / "packs").symlink_to(other)
    store.put("packs/a", b"1")
    store.put("points/a", b"1")
    assert keys(store) == ["packs/a", "points/a"]
    other.rename(tmp_path / "gone")
    with pytest.raises(StoreError, match="cannot list"):
        keys(store)
    assert keys(store, "points/") == ["points/a"]


def test_a_root_behind_a_symlink_works(root: Path, tmp_path: Path) -> None:
    """The location is told as it was given."""
    (tmp_path / "real").mkdir()
    root.symlink_to(tmp_path / "real")
    store = LocalStore(root)
    store.put("a/b", b"1")
    assert keys(store) == ["a/b"]
    assert store.location == str(root)
    assert files(tmp_path / "real") == ["a/b"]


# --- rights ------------------------------------------------------------------------------------------------


def test_only_the_owner_may_look(store: LocalStore, root: Path) -> None:
    """Directories 0700, files 0600, whatever the umask."""
    before = os.umask(0)
    try:
        store.put("packs/a/1", b"1")
        store.put("packs/a/1", b"2", overwrite=True)
        with store.lease("leases/a.json"):
            pass
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [root, *root.rglob("*")]}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}


def test_what_may_not_be_written_is_one_line_and_a_hint(as_nobody: Path) -> None:
    """put, delete and lease say which file and whose right is missing."""
    LocalStore(as_nobody).put("a/b", b"1")
    for path in [as_nobody / "a", as_nobody / "a/b"]:
        path.chmod(0o755)
    os.seteuid(65534)
    store = LocalStore(as_nobody)
    assert store.get("a/b") == b"1"
    for call in (
        lambda: store.put("a/c", b"1"),
        lambda: store.put("c/c", b"1"),
        lambda: store.delete("a/b"),
        lambda: store.lease("leases/x").__enter__(),
    ):
        with pytest.raises(StoreError, match=f"cannot .*{as_nobody}.*: permission denied") as caught:
            call()
        assert "65534" in caught.value.hint and "\n" not in str(caught.value)
        assert not caught.value.transient


def test_a_directory_that_may_not_be_read_fails_the_list(as_nobody: Path) -> None:
    """Not a short list."""
    store = LocalStore(as_nobody)
    store.put("open/b", b"1")
    store.put("shut/b", b"1")
    (as_nobody / "open").chmod(0o755)
    os.seteuid(65534)
    reader = LocalStore(as_nobody)
    assert keys(reader, "open/") == ["open/b"]
    with pytest.raises(StoreError, match="permission denied"):
        keys(reader)


# --- file systems that cannot do everything -----------------------------------------------------------------


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on FAT or SMB."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)


@pytest.mark.usefixtures("no_links")
def test_without_hard_links_a_put_still_refuses_to_replace(store: LocalStore, root: Path) -> None:
    """The kernel's rename that refuses to replace does the same work, also in a race."""
    store.put("a", b"1")
    with pytest.raises(ObjectExists):
        store.put("a", b"2")

    def race(number: int) -> bool:
        with contextlib.suppress(ObjectExists):
            store.put("race", b"%d" % number)
            return True
        return False

    with ThreadPoolExecutor(8) as racers:
        assert sum(racers.map(race, range(8))) == 1
    assert files(root) == ["a", "race"]


@pytest.mark.usefixtures("no_links")
def test_where_nothing_refuses_to_replace_the_store_refuses_to_write(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither links nor such a rename: an error with a hint, and nothing left."""
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    with pytest.raises(StoreError, match="rename without replacing") as caught:
        store.put("a", b"1")
    assert caught.value.hint
    assert files(root) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, 0])
def test_where_locks_are_not_kept_a_lease_is_refused(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A file system that has no locks, or says yes to everybody: no lease rather than a false one."""

    def broken(*_: object) -> None:
        if code:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr("backupd.stores.leases.fcntl.flock", broken)
    with pytest.raises(StoreError, match="keeps no locks") as caught, store.lease("leases/prune.json"):
        pytest.fail("a lease without a lock")
    assert caught.value.hint


def test_a_lock_file_that_was_removed_is_a_lost_lease(store: LocalStore, root: Path) -> None:
    """A lock on a removed file excludes nobody: the holder is told, and the next one gets a lock that counts."""
    with store.lease("leases/prune.json") as lease:
        lease.check()
        (root / "leases/+lock-prune.json").unlink()
        with pytest.raises(Locked, match="lost"):
            lease.check()
        with store.lease("leases/prune.json") as other:
            other.check()
            with pytest.raises(Locked, match="lost"):
                lease.check()
    with store.lease("leases/prune.json") as last:
        last.check()


# --- strangers -----------------------------------------------------------------------------------------------


def test_a_fifo_is_no_object_and_hangs_nobody(store: LocalStore, root: Path) -> None:
    """Nor is a directory or a device."""
    os.mkfifo(root / "fifo")
    (root / "folder").mkdir()
    for key in ("fifo", "folder"):
        with pytest.raises(ObjectMissing):
            store.get(key)
        with pytest.raises(ObjectMissing):
            store.delete(key)
    assert keys(store) == []


def test_what_is_in_the_way_is_named(store: LocalStore, root: Path) -> None:
    """A file where a directory must be, a directory where the object must be."""
    store.put("a", b"1")
    (root / "b").mkdir()
    for key, overwrite in [("a/b", False), ("b", False), ("b", True)]:
        with pytest.raises(StoreError, match="cannot write") as caught:
            store.put(key, b"1", overwrite=overwrite)
        assert not isinstance(caught.value, ObjectExists)
    assert files(root) == ["a"]


def test_deleting_takes_empty_directories_along(store: LocalStore, root: Path) -> None:
    """packs/<source>/<point>/ goes with its last pack; a root that became empty stays."""
    for key in ("packs/a/1/0", "packs/a/1/1", "packs/a/2/0"):
        store.put(key, b"")
    store.delete("packs/a/1/0")
    store.delete("packs/a/1/1")
    assert sorted(path.name for path in (root / "packs/a").iterdir()) == ["2"]
    store.delete("packs/a/2/0")
    assert list(root.iterdir()) == []


def test_puts_and_deletes_in_one_directory_do_not_trip_each_other(store: LocalStore) -> None:
    """A delete that takes a directory away just as a put wants to use it: the put still succeeds."""
    until = time.monotonic() + 1.5

    def churn(number: int) -> int:
        turns = 0
        while time.monotonic() < until:
            store.put(f"deep/er/{number}", b"1")
            store.delete(f"deep/er/{number}")
            turns += 1
        return turns

    with ThreadPoolExecutor(4) as workers:
        assert min(workers.map(churn, range(4))) > 1
    assert keys(store) == []


def test_an_object_deleted_during_a_list_is_no_error(store: LocalStore) -> None:
    """Others work while we list: what stayed all along is listed."""
    for number in range(200):
        store.put(f"stay/{number:03d}", b"")
        store.put(f"go/{number:03d}", b"")
    listing = store.list()
    next(listing)
    for number in range(200):
        store.delete(f"go/{number:03d}")
    assert [info.key for info in listing if info.key.startswith("stay")] == [
        f"stay/{number:03d}" for number in range(200)
    ]
