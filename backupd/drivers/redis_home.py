"""Where a Redis server keeps its data, and how a dump is laid there so that the server takes it up.

The trap: a server with `appendonly yes` ignores dump.rdb and comes up empty. It reads, from version 7 on,
`appendonlydir/` by its manifest, whose base may be an RDB; before that, one file that may begin with an RDB.
So the same dump is laid where each of them looks: one file with two names, neither ever changed in place.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from tarfile import TarFile, TarInfo

from backupd.drivers import _tarstream
from backupd.drivers.rdb import RdbCheck, is_dump
from backupd.drivers.redis_fit import modules, without_modules
from backupd.drivers.redis_wire import Connection, RedisAddress, RedisError
from backupd.errors import CaptureFailed, ContainerError, RestoreFailed
from backupd.model import Container, Json

DATA = "/data"
_REDIS_UID = 999  # in the official images; their start script gives the files to `redis` anyway
_READY_WITHIN = 60.0
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Home:
    """How a server is set up to find its data."""

    directory: str = DATA
    dbfilename: str = "dump.rdb"
    appendonly: bool = False
    appenddirname: str = "appendonlydir"
    appendfilename: str = "appendonly.aof"
    major: int = 7
    uid: int = _REDIS_UID
    gid: int = _REDIS_UID


def layout(home: Home, size: int, dump: Iterable[bytes], *, alone: bool = True) -> Iterator[bytes]:
    """A tar, to be unpacked in `home.directory`, that brings a dump of `size` bytes back. `alone`: nothing is appended
    to it before the server starts, so it can be the dump too. Pure."""
    entry = partial(_tarstream.entry, uid=home.uid, gid=home.gid)
    first = home.dbfilename
    if home.appendonly and home.major >= 7:
        base = f"{home.appendfilename}.1.base.rdb"
        increment = f"{home.appendfilename}.1.incr.aof"
        manifest = f"file {base} seq 1 type b\nfile {increment} seq 1 type i\n".encode()
        folder = f"{home.appenddirname}/"
        yield entry(folder, mode=0o755)
        yield entry(folder + increment)
        yield entry(f"{folder}{home.appendfilename}.manifest", size=len(manifest))
        yield manifest + _tarstream.padding(len(manifest))
        first = folder + base
    elif home.appendonly:
        first = home.appendfilename  # appended to in place: never a second name of the dump
    yield entry(first, size=size)
    yield from _measured(dump, size)
    yield _tarstream.padding(size)
    if alone and first.startswith(home.appenddirname + "/"):
        yield entry(home.dbfilename, link=first)
    yield _tarstream.END


def _measured(dump: Iterable[bytes], size: int) -> Iterator[bytes]:
    left = size
    for chunk in dump:
        left -= len(chunk)
        yield chunk
    if left:
        raise RestoreFailed(
            f"the archived dump is {-left:+d} bytes off its length", hint="run backupd verify"
        )


def refuse_used(container: Container, directory: str) -> None:
    """Raise RestoreFailed where the directory holds a dump or a log with anything in it."""
    try:
        with _tarstream.open_tar(container.read(directory)) as tar:
            used = next((entry.name for entry in tar if entry.isfile() and _used(tar, entry)), "")
    except ContainerError:
        return  # the directory is not there yet
    if used:
        raise RestoreFailed(
            f"{container.name} already holds data: {used.partition('/')[2] or used} is not empty",
            hint="restore into a container with an empty volume; nothing was changed",
        )


def _used(tar: TarFile, entry: TarInfo) -> bool:
    content = tar.extractfile(entry)
    if content is None:
        return False
    head = content.read(_CHUNK)
    if not is_dump(head):
        return bool(head) and ".aof" in entry.name and not entry.name.endswith(".manifest")
    check = RdbCheck()
    try:
        while head:
            check.feed(head)
            if any(d.keys for d in check.summary.databases.values()):
                return True
            head = content.read(_CHUNK)
        return not check.finish().empty
    except CaptureFailed:
        return True  # not whole, but not nothing either


def reach(container: Container, address: RedisAddress, *, timeout: float = _READY_WITHIN) -> Connection:
    """A connection to the server in a running container, once it has loaded its data.

    `address` gives the password; a server that has none is asked without. Raises RestoreFailed.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            return _reach_once(container, address)
        except (RedisError, ContainerError) as error:
            final = isinstance(error, RedisError) and error.code not in ("", "LOADING")
            if final or time.monotonic() > deadline or not container.running:
                last = container.logs().strip()
                raise RestoreFailed(
                    f"the Redis server in {container.name} does not answer: {error.message}",
                    hint=error.hint if final or not last else f"its last lines: {last[-500:]}",
                ) from error
        time.sleep(0.1)


def loading(container: Container, address: RedisAddress) -> str:
    """How much of its files a server that does not answer yet has loaded; empty where that cannot be told."""
    with contextlib.suppress(RedisError, ContainerError), _connected(container, address) as server:
        state = server.info("persistence")
        if state.get("loading") == "1":
            loaded, whole = (int(state[f"loading_{name}_bytes"]) >> 20 for name in ("loaded", "total"))
            return f"loading its data: {loaded} of {whole} MiB"
    return ""


def _connected(container: Container, address: RedisAddress) -> Connection:
    host, port = container.address(6379)
    try:
        return Connection(RedisAddress(host, port, username=address.username, password=address.password))
    except RedisError as error:
        if error.code not in ("ERR", "WRONGPASS") or not address.password:
            raise
        return Connection(RedisAddress(host, port))  # a fresh server knows no passwords


def _reach_once(container: Container, address: RedisAddress) -> Connection:
    server = _connected(container, address)
    try:
        server.call("PING")
        if server.info("persistence").get("loading") == "1":
            raise RedisError("it is loading its data", code="LOADING")
    except BaseException:
        server.close()
        raise
    return server


def look_round(server: Connection, container: Container) -> Home:
    """How this server is set up. Raises RestoreFailed where it must not be restored into."""
    keys = server.info("keyspace")
    if keys:
        raise RestoreFailed(
            f"the Redis server in {container.name} already holds keys in {', '.join(sorted(keys))}",
            hint="restore into a fresh container; nothing was changed",
        )
    role = server.info("replication")
    if role.get("role") == "slave":
        raise RestoreFailed(
            f"{container.name} is a replica of {role.get('master_host')}, which would wipe what is restored",
            hint="restore into the master, or into a container that follows nobody",
        )
    if server.info("cluster").get("cluster_enabled") == "1":
        raise RestoreFailed(
            f"{container.name} is a node of a cluster: it drops the keys of slots that are not its own",
            hint="restore into a server with cluster-enabled no",
        )
    found = server.config("dir", "dbfilename", "appenddirname", "appendfilename")
    about = server.info("server")
    version = about.get("redis_version", "7")
    directory = found.get("dir", DATA)
    uid, gid = _owner(container, directory)
    return Home(
        directory=directory,
        dbfilename=found.get("dbfilename", Home.dbfilename),
        appendonly=server.info("persistence").get("aof_enabled") == "1",
        appenddirname=found.get("appenddirname", Home.appenddirname),
        appendfilename=found.get("appendfilename", Home.appendfilename),
        major=int(version.partition(".")[0]),
        uid=uid,
        gid=gid,
    )


def _owner(container: Container, directory: str) -> tuple[int, int]:
    with _tarstream.open_tar(container.read(directory)) as tar:
        head = tar.next()
    if head is None or head.uid == 0:
        return _REDIS_UID, _REDIS_UID
    return head.uid, head.gid


def refuse_without_modules(server: Connection, container: Container, point: Mapping[str, Json]) -> None:
    """Raise RestoreFailed where the server lacks a module that a recovery point with these attributes needs. One of
    another version may still read it, and loses nothing by trying."""
    if why := without_modules(modules(server.text("INFO", "modules")), point):
        raise RestoreFailed(
            f"{container.name}: {why}",
            hint="restore into a container of the source's own image, with these modules; nothing was changed",
        )


@contextlib.contextmanager
def fresh_server(
    container: Container, address: RedisAddress, point: Mapping[str, Json]
) -> Iterator[tuple[Connection, Home]]:
    """A container's server, running and empty, that will not save by itself when it is stopped. A container that was
    not running is started for it: only the server itself knows for sure where it looks for its data.

    Raises RestoreFailed, with nothing changed, where it holds data already, or cannot take a recovery point with these
    attributes.
    """
    was_running = container.running
    if not was_running:
        refuse_used(container, DATA)
        container.start()
    try:
        with reach(container, address) as server:
            home = look_round(server, container)
            refuse_without_modules(server, container, point)
            refuse_used(container, home.directory)
            with contextlib.suppress(RedisError):  # else it would write an empty dump when it is stopped
                server.call("CONFIG", "SET", "save", "")
            yield server, home
    except BaseException:
        if not was_running:
            container.stop()
        raise


def bring_back(
    container: Container, address: RedisAddress, point: Mapping[str, Json], size: int, dump: Iterable[bytes]
) -> None:
    """Lay a dump, of a recovery point with these attributes, into the data directory of a container's server. It is
    left running if it was running.

    Raises RestoreFailed, with nothing changed, where it holds data already or cannot take the dump.
    """
    was_running = container.running
    with fresh_server(container, address, point) as (_, home):
        pass
    container.stop()
    container.write(home.directory, layout(home, size, dump))
    if was_running:
        container.start()
        reach(container, address, timeout=3600).close()
