"""A restore into a running Redis server that keeps its place: it follows us as a replica, then is a master again.

Its clients stay connected. From before the safety copy is made until the server is a replica, their writes wait
(`CLIENT PAUSE`, Redis 6.2 and newer); as long as it is a replica they are told READONLY. An append-only file is written
anew by the server itself.

What a failure leaves: as long as the last bytes of the dump were not sent, the server holds what it held, and is made a
master again. After that it holds either the restored state or a part of it. Then it stays a replica, read-only, of a
master that is gone: nobody takes a half for the whole. The password it was given to reach us names the safety copy; by
it the next restore knows that server.

The rights, besides those of a backup:
  +replicaof +config|set +client|info +client|list +client|pause +client|unpause +scan +dbsize +select +bgsave +lastsave
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType

from backupd.drivers.redis_fit import modules, unreadable, without_modules
from backupd.drivers.redis_master import Feed, Master, Progress
from backupd.drivers.redis_wire import Connection, RedisError
from backupd.errors import BackupdError, Interrupted, RestoreFailed, UsageError
from backupd.log import carry
from backupd.model import Json

MARK = "backupd-"
"""How the password begins by which a server is let in here: MARK, the safety copy's id, a hyphen, a secret."""
_USER = "backupd"
_PAUSE = 10.0
"""Seconds: how long clients wait for an agent that was killed."""
_RENEWED = 3.0
_PATIENCE = 3600
"""Seconds (repl-timeout) that the server waits for us in the middle of a restore."""
_COUNTED_AT_MOST = 500_000
"""Keys of a database that are looked at to tell how many have expired: some seconds, and 50 MB."""
_SETTLES_WITHIN = 600.0
_NAP = 0.1


# --- decisions, pure -----------------------------------------------------------------------------------------


def refuse(
    about: Mapping[str, str],
    role: Mapping[str, str],
    settings: Mapping[str, str],
    point: Mapping[str, Json],
    *,
    loaded: Collection[str] = (),
    clustered: bool,
) -> None:
    """Raises RestoreFailed where a server must not, or could not, take what a recovery point holds. `about` and `role`:
    its INFO; `loaded`: its modules; `point`: the point's attributes."""
    if clustered:
        raise RestoreFailed(
            "the server is a node of a cluster: it drops the keys of slots that are not its own",
            hint="restore into a fresh container, and import from there",
        )
    if role.get("role") == "slave" and unfinished(settings) is None:
        raise RestoreFailed(
            f"the server is a replica of {role.get('master_host')}, which would wipe what is restored",
            hint="restore into the master; nothing was changed",
        )
    if settings.get("tls-replication") == "yes":
        raise RestoreFailed(
            "the server wants TLS of its master (tls-replication yes), which backupd does not speak",
            hint="CONFIG SET tls-replication no for the time of the restore, or restore into a fresh container",
        )
    needed, there = point.get("databases"), settings.get("databases", "")
    if isinstance(needed, int) and there.isdigit() and needed > int(there):
        raise RestoreFailed(
            f"the source had {needed} databases, the server has {there}",
            hint=f"start it with --databases {needed}; nothing was changed",
        )
    if why := unreadable(about, point) or without_modules(loaded, point):
        raise RestoreFailed(why, hint="restore into a fresh container; nothing was changed")


def unfinished(settings: Mapping[str, str]) -> str | None:
    """The safety copy of a restore that did not end, by the settings of a server; None where there was none."""
    password = settings.get("masterauth", "")
    return password.removeprefix(MARK).rpartition("-")[0] if password.startswith(MARK) else None


class Left(StrEnum):
    """What a server holds after a restore that did not end."""

    BEFORE = "the server holds what it held before"
    AFTER = "the server holds the restored state, whole"
    EARLIER = "the server holds an earlier state than was asked for, as the log was not replayed to its end"
    OTHER = "the server holds another state than was asked for"
    NEITHER = (
        "the server holds nothing whole: what it held is gone, what was to be restored has not all arrived"
    )
    UNKNOWN = "the server does not answer, and nobody knows what it holds"

    @property
    def whole(self) -> bool:
        """It may be a master again."""
        return self in (Left.BEFORE, Left.AFTER)


def left(
    replid: str, progress: Progress, role: Mapping[str, str], settings: Mapping[str, str], *, loading: bool
) -> Left:
    """By what was sent, and by what the server says of itself: it takes over our history's name when it has loaded the
    whole dump. Before it has every byte of that in a file, it throws nothing away; one that loads from the connection
    does so sooner, but where it is told to keep a copy."""
    if role.get("master_replid") == replid:
        reached = int(role.get("slave_repl_offset") or role.get("master_repl_offset") or 0)
        if progress.strayed:
            return Left.OTHER
        return Left.AFTER if progress.end is not None and reached >= progress.end else Left.EARLIER
    keeps = settings.get("repl-diskless-load", "disabled") in ("disabled", "on-empty-db", "swapdb")
    if not loading and not progress.dump_sent and (keeps or not progress.dump):
        return Left.BEFORE
    return Left.NEITHER


@dataclass(frozen=True, slots=True)
class Address:
    """Where the server finds us, and where we listen for it."""

    reached: str
    listen: str
    """Empty: every address of this machine."""
    port: int = 0

    @classmethod
    def of_option(cls, text: str) -> Address:
        """HOST or HOST:PORT, as the server reaches it. Raises UsageError."""
        host, colon, port = text.rpartition(":") if "]" in text or text.count(":") == 1 else (text, "", "")
        if not colon:
            host, port = text, "0"
        if not host or not port.isdigit() or int(port) > 65535:
            raise UsageError(
                f"--listen {text!r} is no address", hint="HOST or HOST:PORT, as the server reaches it"
            )
        return cls(host.strip("[]"), "", int(port))

    @classmethod
    def of_client(cls, line: str) -> Address:
        """From our own line of CLIENT LIST: where our connection came from, as the server sees it. The unix socket has
        no address: then server and agent share a machine."""
        words = dict(word.split("=", 1) for word in line.split() if "=" in word)
        host = words.get("addr", "").rpartition(":")[0].strip("[]")
        return cls(host, host) if host and not host.startswith("/") else cls("127.0.0.1", "127.0.0.1")


# --- what is asked for ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a server is to hold."""

    feed: Feed
    point: Mapping[str, Json]
    """Attributes of the recovery point."""
    safety: str
    """The recovery point that holds what the server held."""
    listen: str = ""
    """Where the server reaches us; empty: where it sees us come from."""
    check: Callable[[], None] = lambda: None
    """Called often; may raise."""
    stage: Callable[[str], None] = lambda _text: None


@dataclass(slots=True)
class Outcome:
    """How it ended."""

    expired: int | None = 0
    """Keys of the restored state whose time had passed: the server drops them. None: too many to be counted."""
    warnings: list[str] = field(default_factory=list)


# --- carried out ---------------------------------------------------------------------------------------------


class Standing:
    """A running server, its writes held. A context."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._server = connect()
        try:
            self._settings = self._server.config(
                "masterauth", "masteruser", "repl-timeout", "replica-read-only", "repl-diskless-load",
                "tls-replication", "databases", "save",
            )  # fmt: skip
            self._role = self._server.info("replication")
        except BaseException:
            self._server.close()
            raise
        self.unfinished = unfinished(self._settings) if self._role.get("role") == "slave" else None
        """The safety copy that a restore before this one made and did not end; empty where it is not known."""
        self._pause = _Pause(connect)
        self.warnings: list[str] = []

    def __enter__(self) -> Standing:
        try:
            if self.unfinished is None and not self._pause.begin(self._server):
                self.warnings.append(
                    "this server cannot hold its clients' writes: what they wrote after the safety copy is in neither"
                )
        except BaseException:
            self._server.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pause.end()
        self._server.close()

    def replace(self, wanted: Wanted) -> Outcome:
        """Make the server hold what is wanted, nothing else, and be a master as before. Raises RestoreFailed, which
        says what the server holds now."""
        server = self._server
        clustered = server.info("cluster").get("cluster_enabled") == "1"
        loaded = modules(server.text("INFO", "modules"))
        refuse(
            server.info("server"),
            self._role,
            self._settings,
            wanted.point,
            loaded=loaded,
            clustered=clustered,
        )
        at = Address.of_option(wanted.listen) if wanted.listen else Address.of_client(_own_line(server))
        password = f"{MARK}{wanted.safety}-{secrets.token_hex(16)}"
        user = _USER if "masteruser" in self._settings else ""
        outcome = Outcome(warnings=list(self.warnings))
        refusals = _refusals(server)
        with _listening(wanted.feed, at, user, password) as master:
            try:
                self._follow(at.reached, master.port, user, password)
                wanted.stage("sending the restored state")
                with master.led(wanted.check):
                    self._renew()
                    self._refuse_other(wanted.feed)
                    self._refuse_strayed(master.progress, refusals)
                    wanted.stage("counting what has expired")
                    outcome.expired = count_expired(self._server, wanted.check)
                    self._server.call("REPLICAOF", "NO", "ONE")
            except BaseException as error:
                raise self._failed(error, wanted, master.progress) from error
        outcome.warnings += self._put_back()
        wanted.stage("waiting until it is on the server's disk")
        outcome.warnings += _settle(self._server, self._settings)
        return outcome

    def _follow(self, host: str, port: int, user: str, password: str) -> None:
        server, settings = self._server, self._settings
        self._pause.check()
        server.call("CONFIG", "SET", "masterauth", password)
        if user:
            server.call("CONFIG", "SET", "masteruser", user)
        if int(settings.get("repl-timeout", _PATIENCE)) < _PATIENCE:
            server.call("CONFIG", "SET", "repl-timeout", str(_PATIENCE))
        if settings.get("replica-read-only") == "no":
            server.call("CONFIG", "SET", "replica-read-only", "yes")
        server.call("REPLICAOF", host, str(port))
        self._pause.end()  # read-only from here on; a server that holds writes might hold ours too

    def _refuse_other(self, feed: Feed) -> None:
        """It acknowledged; that what it has is our history is looked at all the same."""
        if self._server.info("replication").get("master_replid") != feed.replid:
            raise RestoreFailed("the server follows another master by now", hint="who told it to?")

    def _refuse_strayed(self, progress: Progress, before: int) -> None:
        """A replica goes on behind a command that it does not know, as of a module that it lacks."""
        refused = _refusals(self._server) - before
        if refused > 0:
            progress.strayed = True
            raise RestoreFailed(
                f"the server could not execute {refused} commands of the log",
                hint="its log names them; has it the version and the modules that wrote them?",
            )

    def _renew(self) -> None:
        """A server may close a connection on which nothing was said for long."""
        self._server.close()
        self._server = self._connect()

    def _put_back(self) -> list[str]:
        """The settings as they were; what could not be. The password goes last: it tells that a restore is under way.
        What a restore that was killed had set is not known any more: then there is none."""
        failed = []
        for name in ("repl-timeout", "replica-read-only", "masteruser", "masterauth"):
            before = self._settings.get(name)
            if before is None:
                continue
            if self.unfinished is not None and name.startswith("master"):
                before = ""
                failed.append(f"{name} is empty now: if the server had one, set it again")
            try:
                self._server.call("CONFIG", "SET", name, before)
            except RedisError as error:
                failed.append(f"{name} could not be put back: {error.message}")
        return failed

    # --- where it did not end well

    def _failed(self, error: BaseException, wanted: Wanted, progress: Progress) -> BaseException:
        """Make the server a master again where what it holds is whole, else leave it read-only; the error to raise."""
        state, notes = Left.UNKNOWN, []
        try:
            self._renew()
            role = self._server.info("replication")
            loading = self._server.info("persistence").get("loading") == "1"
            state = left(wanted.feed.replid, progress, role, self._settings, loading=loading)
            if state.whole:
                if role.get("role") == "slave":
                    self._server.call("REPLICAOF", "NO", "ONE")
                notes = self._put_back()
        except BackupdError as another:
            notes.append(
                f"{another.message}; make it a master again: REPLICAOF NO ONE"
                if state.whole
                else another.message
            )
        standing = "takes writes" if state.whole else "is read-only"
        told = f"{error or type(error).__name__}; {state}, and {standing}"
        hint = getattr(error, "hint", "")
        if not state.whole:
            hint = _way_out(state, wanted.safety) + (f" (first: {hint})" if hint else "")
        hint = "; ".join(filter(None, (hint, *notes)))
        if isinstance(error, (Interrupted, KeyboardInterrupt)):
            return Interrupted(told, hint=hint)
        return RestoreFailed(told, hint=hint)


def _way_out(state: Left, safety: str) -> str:
    ways = ["run the restore again"]
    if safety:
        ways.append(f"or bring back what it held: --point {safety} --to in-place")
    if state is Left.EARLIER:
        ways.append("or take it as it is: REPLICAOF NO ONE")
    return ", ".join(ways)


class _Pause:
    """Clients' writes wait, as long as somebody renews it: the server goes on by itself when the agent was killed."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure = ""

    def begin(self, server: Connection) -> bool:
        """False where the server knows no such thing."""
        try:
            _hold(server)
        except RedisError as error:
            if error.code != "ERR":
                raise
            return False
        self._thread = threading.Thread(target=carry(self._renew), name="pause", daemon=True)
        self._thread.start()
        return True

    def _renew(self) -> None:
        try:
            with self._connect() as server:
                while not self._stop.wait(_RENEWED):
                    _hold(server)
                server.call("CLIENT", "UNPAUSE")
        except BackupdError as error:
            self._failure = error.message

    def check(self) -> None:
        """Raises RestoreFailed where writes were let through."""
        if self._failure:
            raise RestoreFailed(
                f"the writes of the server's clients could not be held: {self._failure}", hint="try again"
            )

    def end(self) -> None:
        """Calling it twice is fine."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


def _hold(server: Connection) -> None:
    server.call("CLIENT", "PAUSE", str(int(_PAUSE * 1000)), "WRITE")


def _listening(feed: Feed, at: Address, user: str, password: str) -> Master:
    """At the one address that the server comes to, where this machine has it."""
    if at.listen:
        with contextlib.suppress(RestoreFailed):
            return Master(feed, host=at.listen, port=at.port, user=user, password=password)
    return Master(feed, port=at.port, user=user, password=password)


def _own_line(server: Connection) -> str:
    try:
        return server.text("CLIENT", "INFO")
    except RedisError as error:  # before 6.2
        if error.code != "ERR":
            raise
    mine = f"id={server.call('CLIENT', 'ID')!r} "
    return next((line for line in server.text("CLIENT", "LIST").splitlines() if line.startswith(mine)), "")


def _refusals(server: Connection) -> int:
    """Errors that it answered its master, since its start."""
    return int(server.info("stats").get("unexpected_error_replies", "0"))


def count_expired(server: Connection, check: Callable[[], None]) -> int | None:
    """Keys of a replica whose time has passed: counted, but not shown. None where that is too many to look at."""
    found = 0
    for name, line in server.info("keyspace").items():
        counts = dict(pair.split("=", 1) for pair in line.split(",") if "=" in pair)
        if counts.get("expires", "0") == "0":
            continue
        if int(counts["keys"]) > _COUNTED_AT_MOST:
            return None
        server.call("SELECT", name.removeprefix("db"))
        shown: set[bytes] = set()  # a table that is being resized may show a key twice
        cursor = b"0"
        while True:
            check()
            match server.call("SCAN", cursor, "COUNT", "5000"):
                case [bytes(cursor), list(keys)]:
                    shown.update(
                        hashlib.blake2b(key, digest_size=8).digest() for key in keys if isinstance(key, bytes)
                    )
            if cursor == b"0":
                break
        found += max(0, int(counts["keys"]) - len(shown))
    return found


def _settle(server: Connection, settings: Mapping[str, str]) -> list[str]:
    """What the server now holds is on its disk too, where it keeps anything there; why not, where it is not."""
    state = server.info("persistence")
    if state.get("aof_enabled") == "1":
        name, running = "aof_last_bgrewrite_status", ["aof_rewrite_in_progress", "aof_rewrite_scheduled"]
    elif settings.get("save"):
        name, running = "rdb_last_bgsave_status", ["rdb_bgsave_in_progress"]
        with contextlib.suppress(
            RedisError
        ):  # one is under way: then it is that one's end that is waited for
            server.call("BGSAVE")
    else:
        return []
    deadline = time.monotonic() + _SETTLES_WITHIN
    while any(server.info("persistence").get(word, "0") != "0" for word in running):
        if time.monotonic() > deadline:
            return [
                "the server still writes what it holds to its disk: a restart now may bring back what it held"
            ]
        time.sleep(_NAP)
    if server.info("persistence").get(name) == "ok":
        return []
    return [
        "the server could not write what it holds to its disk; its log says why. A restart may bring back less"
    ]
