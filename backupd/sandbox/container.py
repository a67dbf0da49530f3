"""One Docker container: run programs in it, read and write its files, reach its ports."""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from backupd.errors import CommandFailed, ContainerError
from backupd.model import Bytes
from backupd.sandbox.engine import asking, describe, readable
from backupd.sandbox.said import ended_badly
from backupd.sandbox.wire import Hijacked, in_blocks

if TYPE_CHECKING:
    from backupd.sandbox.engine import Engine

MARK = "BACKUPD_EXEC"
KILL = (
    f'for e in /proc/[0-9]*/environ; do if grep -qa "{MARK}=$1" "$e" 2>/dev/null; then '
    'p=${e%/environ}; kill "-$2" "${p#/proc/}"; fi; done'
)
"""Ends what one exec started: the engine has no call for it, and would let a dump run on for nobody.
Programs inherit the mark; only the mark's holders are ended."""
GRACE = 2.0  # seconds between asking a program to end and making it
CONFUSED = frozenset({126, 127})
"""Statuses with which the engine says that it could not start the program; it says why on stdout."""


class DockerContainer:
    """Implements `model.Container`."""

    def __init__(self, engine: Engine, attributes: Mapping[str, Any]) -> None:
        self._engine = engine
        self.id = str(attributes["Id"])
        self._info = describe(attributes)

    def __repr__(self) -> str:
        return f"DockerContainer({self.name!r})"

    @property
    def name(self) -> str:
        return self._info.name

    @property
    def image(self) -> str:
        return self._info.image

    @property
    def env(self) -> Mapping[str, str]:
        return self._info.env

    @property
    def labels(self) -> Mapping[str, str]:
        return self._info.labels

    @property
    def status(self) -> str:
        """`created`, `running`, `paused`, `restarting`, `exited`, `dead`: as of now."""
        return str(self.inspect()["State"]["Status"])

    @property
    def running(self) -> bool:
        """As of now; a paused container runs."""
        return bool(self.inspect()["State"]["Running"])

    @property
    def kernel(self) -> tuple[int, ...]:
        return self._engine.kernel

    @property
    def exit_code(self) -> int:
        """Of its last end."""
        return int(self.inspect()["State"]["ExitCode"])

    def inspect(self) -> dict[str, Any]:
        """What the engine says of it now."""
        with asking(f"look at the container {self.name}"):
            attributes: dict[str, Any] = self._engine.api.inspect_container(self.id)
        return attributes

    # --- programs ------------------------------------------------------------------------------------

    def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: Iterable[Bytes] | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        timeout: float | None = None,
    ) -> Iterator[bytes]:
        """Run a program in it; stdout in chunks, as they come. Secrets go into `env`, never into `argv`.

        Nothing is started before the first chunk is asked for. `stdin` is read by another thread and closed
        at its end; when it raises, the program is ended and the same exception is raised here. Closing the
        iterator early ends the program. `timeout`: seconds for the whole.

        Raises CommandFailed at the end when it ended badly or took too long, ContainerError for the engine's
        part.
        """
        api = self._engine.api
        mark = secrets.token_hex(16)
        deadline = None if timeout is None else time.monotonic() + timeout
        with asking(
            f"run {argv[0]} in the container {self.name}",
            hint=f"is it running? docker ps -af name={self.name}",
        ):
            made = api.exec_create(
                self.id,
                list(argv),
                stdin=stdin is not None,
                environment={**(env or {}), MARK: mark},
                user=user or "",
            )["Id"]
            wire = self._hijack(made)
        last, ended = b"", False
        try:
            if stdin is not None:
                wire.feed(stdin)
            for chunk in wire.output(deadline=deadline):
                last = chunk
                yield chunk
            if wire.stdin_error is not None:
                raise wire.stdin_error
            status = self._status_of(made, argv[0])
            ended = True
        except TimeoutError:
            raise CommandFailed(
                f"{argv[0]} in {self.name} did not end within {timeout:g} s", stderr=wire.stderr
            ) from None
        finally:
            if not ended:
                self._kill(made, wire, mark, user or "")
            wire.close()
        if status != 0:
            said = wire.stderr
            if status in CONFUSED and not said:
                said = last.decode(errors="replace").strip()
            raise ended_badly(argv[0], status, said, where=f" in {self.name}")

    def _hijack(self, execution: str) -> Hijacked:
        api = self._engine.api
        response = api._post_json(
            api._url("/exec/{0}/start", execution),
            headers={"Connection": "Upgrade", "Upgrade": "tcp"},
            data={"Tty": False, "Detach": False},
            stream=True,
        )
        api._raise_for_status(response)
        return Hijacked(response)

    def _status_of(self, execution: str, program: str) -> int:
        """The exit status; the engine may know it a moment after the stream has ended."""
        deadline = time.monotonic() + 30
        with asking(f"ask how {program} in {self.name} ended"):
            while True:
                state = self._engine.api.exec_inspect(execution)
                if not state["Running"] and state["ExitCode"] is not None:
                    return int(state["ExitCode"])
                if time.monotonic() > deadline:
                    raise ContainerError(f"{program} in {self.name} closed its output and runs on")
                time.sleep(0.02)

    def _kill(self, execution: str, wire: Hijacked, mark: str, user: str) -> None:
        """End a program whose output nobody wants any more. Best effort: it must not hide why."""
        api = self._engine.api
        for sign in ("TERM", "KILL"):
            with contextlib.suppress(Exception):
                if not api.exec_inspect(execution)["Running"]:
                    return
                killer = api.exec_create(self.id, ["sh", "-c", KILL, "sh", mark, sign], user=user)["Id"]
                api.exec_start(killer, detach=True)
                # The engine holds back the end of any exec while another's output is stuck: waiting for the
                # killer without reading on would be waiting for ever.
                wire.drain(GRACE)
                for _ in range(40):
                    if not api.exec_inspect(execution)["Running"]:
                        return
                    time.sleep(GRACE / 40)

    # --- files ---------------------------------------------------------------------------------------

    def read(self, path: str) -> Iterator[bytes]:
        """A tar of `path`, made by the engine; works on a stopped container. No xattrs, whole seconds."""
        api = self._engine.api
        with asking(f"read {path} of the container {self.name}"):
            url = api._url("/containers/{0}/archive", self.id)
            response = api.get(url, params={"path": path}, stream=True, timeout=api.timeout)
            try:
                api._raise_for_status(response)
                yield from response.iter_content(1 << 20)
            finally:  # half read and left open, it makes the engine hold the container's lock for ever
                response.close()

    def write(self, path: str, tar: Iterable[Bytes]) -> None:
        """Unpack a tar at `path`, which must be there; works on a stopped container."""
        with asking(f"write {path} of the container {self.name}"):
            self._engine.api.put_archive(self.id, path, in_blocks(tar))

    def mount(self, destination: str, *, whole: bool = False) -> Path | None:
        """The host directory behind `destination`, when this process can reach it.

        An agent in a container of its own sees other paths than the engine's host: a path that exists here is
        believed only when it has the mode and the nanosecond mtime that the engine tells of the container's. `whole`:
        None, too, where something else is mounted below, as there the container sees another tree.
        """
        wanted = PurePosixPath(destination)
        mounts = describe(self.inspect()).mounts
        around = [m for m in mounts if m.source and wanted.is_relative_to(m.destination)]
        below = [m for m in mounts if wanted in PurePosixPath(m.destination).parents]
        if not around or (whole and below) or not self._engine.is_local:
            return None
        innermost = max(around, key=lambda mount: len(PurePosixPath(mount.destination).parts))
        path = Path(innermost.source) / wanted.relative_to(innermost.destination)
        for _ in range(3):  # a directory in use may change between the two looks
            if not readable(path):
                return None
            if self._is_same_place(path, destination):
                return path
        return None

    def _is_same_place(self, path: Path, inside: str) -> bool:
        from docker.utils import decode_json_header

        api = self._engine.api
        before = path.stat()
        with asking(f"look at {inside} of the container {self.name}"):
            url = api._url("/containers/{0}/archive", self.id)
            response = api.head(url, params={"path": inside}, timeout=api.timeout)
            header = response.headers.get("x-docker-container-path-stat")
        if response.status_code != 200 or not header:
            return False
        told, after = decode_json_header(header), path.stat()
        # equal, where nobody writes; a busy directory (SQLite's journal comes and goes) changes between the looks
        same_time = before.st_mtime_ns <= _nanoseconds(told["mtime"]) <= after.st_mtime_ns
        return (told["mode"] & 0o777) == (after.st_mode & 0o777) and same_time

    # --- life ----------------------------------------------------------------------------------------

    def start(self) -> None:
        with asking(f"start the container {self.name}"):
            self._engine.api.start(self.id)

    def stop(self, *, timeout: int = 30) -> None:
        """Ask it to end; make it after `timeout` seconds. One that is stopped stays so."""
        with asking(f"stop the container {self.name}"):
            self._engine.api.stop(self.id, timeout=timeout)

    def pause(self) -> None:
        with asking(f"pause the container {self.name}"):
            self._engine.api.pause(self.id)

    def unpause(self) -> None:
        with asking(f"unpause the container {self.name}"):
            self._engine.api.unpause(self.id)

    def logs(self, lines: int = 20) -> str:
        """Its last lines, stdout and stderr together."""
        with asking(f"read the logs of the container {self.name}"):
            return str(self._engine.api.logs(self.id, tail=lines).decode(errors="replace")).strip()

    def address(self, port: int) -> tuple[str, int]:
        """Where this process reaches a TCP port of it: as published, else on a network both are in.

        Raises ContainerError when neither is there.
        """
        network = self.inspect()["NetworkSettings"]
        published = [
            (_reachable(binding.get("HostIp", ""), self._engine), int(binding["HostPort"]))
            for binding in (network.get("Ports") or {}).get(f"{port}/tcp") or ()
        ]
        inside = [
            (str(end["IPAddress"]), port)
            for end in (network.get("Networks") or {}).values()
            if end.get("IPAddress")
        ]
        # A service that does not listen yet answers nowhere; then the published port is the one to wait for.
        for candidate in [*published, *inside]:
            with contextlib.suppress(OSError), socket.create_connection(candidate, timeout=1):
                return candidate
        if published:
            return published[0]
        raise ContainerError(
            f"port {port} of the container {self.name} cannot be reached from here",
            hint="publish the port, or put this agent on one of the container's networks",
        )


def _reachable(host_ip: str, engine: Engine) -> str:
    """A published port's address as seen from here: an engine elsewhere publishes on its own host."""
    if not engine.is_local:
        from urllib.parse import urlsplit

        return urlsplit(str(engine.api.base_url)).hostname or "127.0.0.1"
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host_ip, host_ip)  # noqa: S104


def _nanoseconds(rfc3339: str) -> int:
    """Go's RFC 3339 with up to nine digits as nanoseconds since 1970; datetime keeps only six."""
    head, dot, rest = rfc3339.partition(".")
    digits = ""
    while dot and rest[:1].isdigit():
        digits, rest = digits + rest[0], rest[1:]
    if not dot:  # whole seconds: the zone is still at the end
        return round(datetime.fromisoformat(head).timestamp()) * 10**9
    return round(datetime.fromisoformat(head + rest).timestamp()) * 10**9 + int(digits.ljust(9, "0"))
