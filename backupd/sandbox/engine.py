"""The Docker engine: finding it, asking it, and what it knows. Connected to when first asked."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from backupd.errors import BackupdError, ContainerError
from backupd.model import Bytes, Progress, Silence
from backupd.sandbox.said import ended_badly

if TYPE_CHECKING:
    from backupd.sandbox.container import DockerContainer
    from backupd.sandbox.wire import Hijacked

TIMEOUT = 60  # seconds for an answer of the engine; streams have none
PULL_STALL = 120.0  # seconds without a word from a registry
PULL_LIMIT = 3600.0
GIVE_UP = 30.0  # seconds to read on from a helper that is being removed
HELPER = "backupd.helper"
DOCKER_HOST_HINT = "start Docker, or set DOCKER_HOST; in a container, mount /var/run/docker.sock"


class Mount(NamedTuple):
    """Something mounted in a container."""

    kind: str
    """`volume`, `bind` or `tmpfs`."""
    name: str
    """The volume's name; empty for others."""
    source: str
    """On the engine's host."""
    destination: str
    writable: bool


@dataclass(frozen=True, slots=True)
class ContainerInfo:
    """What the engine says about one container."""

    name: str
    image: str
    status: str
    labels: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    mounts: tuple[Mount, ...] = ()


def describe(attributes: Mapping[str, Any]) -> ContainerInfo:
    """What `inspect` says, in our words."""
    config = attributes["Config"]
    mounts = tuple(
        Mount(
            kind=mount.get("Type", ""),
            name=mount.get("Name", ""),
            source=mount.get("Source", ""),
            destination=mount["Destination"],
            writable=bool(mount.get("RW", True)),
        )
        for mount in attributes.get("Mounts") or ()
    )
    return ContainerInfo(
        name=attributes["Name"].lstrip("/"),
        image=config.get("Image", ""),
        status=attributes["State"]["Status"],
        labels=dict(config.get("Labels") or {}),
        env=dict(pair.partition("=")[::2] for pair in config.get("Env") or ()),
        mounts=mounts,
    )


def kernel_of(release: str) -> tuple[int, ...]:
    """Major and minor number of a release as `uname -r` prints it. Pure."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else ()


class Engine:
    """A Docker engine. Safe to use from several threads."""

    def __init__(self, *, timeout: int = TIMEOUT) -> None:
        self._timeout = timeout
        self._api: Any = None
        self._lock = threading.Lock()

    @property
    def api(self) -> Any:
        """docker-py's client, for this room. Raises ContainerError where no engine answers."""
        with self._lock:
            if self._api is None:
                self._api = _connect(self._timeout)
            return self._api

    @property
    def is_local(self) -> bool:
        """True when the engine answers on a socket of this machine: its paths may be ours."""
        return str(getattr(self.api, "base_url", "")).startswith("http+docker://")

    def ping(self) -> str:
        """The engine's version. Raises ContainerError with a hint when it cannot be used."""
        with asking("ask the container engine"):
            return str(self.api.version()["Version"])

    @cached_property
    def kernel(self) -> tuple[int, ...]:
        """The version of the engine's Linux, as (6, 1); empty where it does not tell."""
        with asking("ask the container engine"):
            return kernel_of(str(self.api.version().get("KernelVersion") or ""))

    def close(self) -> None:
        """Let the connections go; the next call makes new ones."""
        with self._lock:
            if self._api is not None:
                self._api.close()
                self._api = None

    # --- containers and volumes ----------------------------------------------------------------------

    def container(self, name: str) -> DockerContainer:
        """An existing container, by name or id. Raises ContainerError when there is none."""
        from backupd.sandbox.container import DockerContainer

        with asking(f"find the container {name!r}", hint="docker ps -a shows what there is"):
            return DockerContainer(self, self.api.inspect_container(name))

    def containers(self, *, running_only: bool = False) -> list[ContainerInfo]:
        """Every container of the engine, sorted by name."""
        found = []
        with asking("list the containers"):
            for row in self.api.containers(all=not running_only):
                with contextlib.suppress(_not_found()):  # gone since it was listed
                    found.append(describe(self.api.inspect_container(row["Id"])))
        return sorted(found, key=lambda info: info.name)

    def volume_path(self, name: str) -> Path | None:
        """Where a named volume lies, when this process can read it there.

        Raises ContainerError when there is no such volume.
        """
        with asking(f"find the volume {name!r}", hint="docker volume ls shows what there is"):
            volume = self.api.inspect_volume(name)
        path = Path(volume.get("Mountpoint") or "/nonexistent")
        # A volume of another driver, or of an engine elsewhere, names a path that is not ours to read.
        if volume.get("Driver") == "local" and self.is_local and readable(path):
            return path
        return None

    def volume_users(self, name: str) -> list[ContainerInfo]:
        """The containers, running or not, that mount this volume."""
        return [c for c in self.containers() if any(m.kind == "volume" and m.name == name for m in c.mounts)]

    # --- images --------------------------------------------------------------------------------------

    def image_present(self, image: str) -> bool:
        """Is the image on this engine?"""
        with asking(f"look for the image {image}"):
            try:
                self.api.inspect_image(image)
            except _not_found():
                return False
        return True

    def any_image(self) -> str | None:
        """Some image that is present: enough for a container that never runs."""
        with asking("list the images"):
            return next((str(row["Id"]) for row in self.api.images()), None)

    def ensure_image(self, image: str, *, progress: Progress | None = None) -> None:
        """Pull the image unless it is there.

        Raises ContainerError when the registry refuses or falls silent.
        """
        if not self.image_present(image):
            self._pull(image, progress or Silence())

    def _pull(self, image: str, progress: Progress) -> None:
        from docker import auth, utils
        from requests.exceptions import RequestException

        repository, tag = utils.parse_repository_tag(image)
        hint = f"docker pull {image} shows more; on a machine without a registry, docker load it"
        deadline = time.monotonic() + PULL_LIMIT
        progress.stage(f"pulling {image}")
        with asking(f"pull the image {image}", hint=hint):
            # docker-py's own pull() waits for ever between two words of a registry
            header = auth.get_config_header(self.api, auth.resolve_repository_name(repository)[0])
            response = self.api._post(
                self.api._url("/images/create"),
                params={"fromImage": repository, "tag": tag or "latest"},
                headers={"X-Registry-Auth": header} if header else {},
                stream=True,
                timeout=(self._timeout, PULL_STALL),
            )
            self.api._raise_for_status(response)
            layers: dict[str, int] = {}
            try:
                for line in response.iter_lines():
                    said = json.loads(line) if line else {}
                    if "error" in said:
                        raise ContainerError(f"cannot pull the image {image}: {said['error']}", hint=hint)
                    _tell_pull(said, layers, progress)
                    if time.monotonic() > deadline:
                        raise ContainerError(f"pulling {image} took over {PULL_LIMIT:.0f} s", hint=hint)
            except RequestException as error:
                raise ContainerError(f"the pull of {image} broke off or fell silent", hint=hint) from error
            finally:
                response.close()

    # --- helpers -------------------------------------------------------------------------------------

    def run_helper(
        self,
        image: str,
        argv: Sequence[str],
        *,
        volumes: Mapping[str, tuple[str, str]],
        stdin: Iterable[Bytes] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[bytes]:
        """Run a program in a throwaway container and yield its stdout.

        `volumes`: name of an existing volume -> (where it is mounted, "ro" or "rw"). It runs as root, without
        a network, and is removed in any case, also when the iterator is closed early. `stdin` is read by
        another thread. Nothing happens before the first chunk is asked for.

        Raises CommandFailed at the end when the program ended badly, ContainerError for the engine's part.
        """
        for name in volumes:
            self.volume_path(name)  # the engine would make a missing volume, and back up its emptiness
        self.ensure_image(image, progress=progress)
        self._sweep_helpers()
        identity = self._create_helper(image, argv, volumes, feed=stdin is not None)
        wire = None
        try:
            with asking(f"start a helper of {image}"):
                wire = self._attach(identity, feed=stdin is not None)
                self.api.start(identity)
            if stdin is not None:
                wire.feed(stdin)
            yield from wire.output()
            if wire.stdin_error is not None:
                raise wire.stdin_error
            with asking("wait for the helper"):
                status = int(self.api.wait(identity)["StatusCode"])
        finally:
            if wire is not None:
                # The engine does not let go of a container whose output is stuck, so read on meanwhile.
                threading.Thread(target=wire.drain, args=(GIVE_UP,), daemon=True).start()
            try:  # before its stdin is closed: half of its input must not look like the whole
                with asking("remove the helper"), contextlib.suppress(_not_found()):
                    self.api.remove_container(identity, force=True, v=True)
            finally:
                if wire is not None:
                    wire.close()
        if status != 0:
            raise ended_badly(argv[0], status, wire.stderr, where=f" in a helper of {image}")

    def _create_helper(
        self, image: str, argv: Sequence[str], volumes: Mapping[str, tuple[str, str]], *, feed: bool
    ) -> str:
        with asking(f"make a helper of {image}"):
            host = self.api.create_host_config(
                binds={name: {"bind": path, "mode": mode} for name, (path, mode) in volumes.items()},
                network_mode="none",
                log_config={"Type": "none"},  # else the engine writes the whole stream to a log file too
            )
            made = self.api.create_container_from_config(
                {
                    "Image": image,
                    "Entrypoint": list(argv[:1]),
                    "Cmd": list(argv[1:]),
                    "User": "0:0",
                    "Labels": {HELPER: "1"},
                    "OpenStdin": feed,
                    "StdinOnce": feed,
                    "AttachStdin": feed,
                    "AttachStdout": True,
                    "AttachStderr": True,
                    "HostConfig": host,
                }
            )
            return str(made["Id"])

    def _attach(self, identity: str, *, feed: bool) -> Hijacked:
        api = self.api
        response = api._post(
            api._url("/containers/{0}/attach", identity),
            params={"stdin": int(feed), "stdout": 1, "stderr": 1, "stream": 1},
            headers={"Connection": "Upgrade", "Upgrade": "tcp"},
            stream=True,
        )
        api._raise_for_status(response)
        from backupd.sandbox.wire import Hijacked

        return Hijacked(response)

    def _sweep_helpers(self) -> None:
        """Remove helpers that ended without their agent: it was killed while they ran."""
        with asking("look for old helpers"):
            old = self.api.containers(all=True, filters={"label": f"{HELPER}=1", "status": "exited"})
            for row in old:
                if row["Created"] < time.time() - 3600:
                    with contextlib.suppress(_not_found()):
                        self.api.remove_container(row["Id"], v=True)


# --- asking ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def asking(doing: str, *, hint: str = "") -> Iterator[None]:
    """Whatever docker-py raises inside becomes a ContainerError that begins with "cannot <doing>"."""
    try:
        yield
    except BackupdError:
        raise
    except Exception as error:
        translated = _translate(error, doing, hint)
        if translated is None:
            raise
        raise translated from error


def _translate(error: Exception, doing: str, hint: str) -> ContainerError | None:
    from docker.errors import APIError, DockerException
    from requests.exceptions import RequestException, Timeout

    if isinstance(error, APIError):
        said = str(error.explanation or error).strip()
        if error.status_code == 403:
            hint = "a socket proxy in between must allow this call"
        return ContainerError(f"cannot {doing}: {said}", hint=hint)
    if isinstance(error, Timeout):
        return ContainerError(f"cannot {doing}: the container engine did not answer in time", hint=hint)
    if isinstance(error, DockerException | RequestException):
        return _unreachable(error, "")
    return None


def _unreachable(error: Exception, where: str) -> ContainerError:
    text = str(error)
    place = f" at {where}" if where else ""
    if "Permission denied" in text:
        return ContainerError(
            f"this user may not use the container engine{place}",
            hint="add the user to the group docker, or run as one who may",
        )
    return ContainerError(f"no container engine answers{place}", hint=DOCKER_HOST_HINT)


def _not_found() -> type[Exception]:
    from docker.errors import NotFound

    return NotFound


def _connect(timeout: int) -> Any:
    """The engine named by DOCKER_HOST, else the one of this machine, else this user's own."""
    from docker import APIClient
    from docker.errors import DockerException
    from docker.utils import kwargs_from_env
    from requests.exceptions import RequestException

    try:
        settings: dict[str, Any] = {**kwargs_from_env()}
    except DockerException as error:  # DOCKER_TLS_VERIFY without its certificates
        raise ContainerError(f"DOCKER_HOST cannot be used: {error}", hint="check DOCKER_CERT_PATH") from error
    own = f"{os.environ.get('XDG_RUNTIME_DIR', f'/run/user/{os.getuid()}')}/docker.sock"
    if "base_url" not in settings:
        rootless = not Path("/var/run/docker.sock").exists() and Path(own).exists()
        settings["base_url"] = f"unix://{own}" if rootless else "unix:///var/run/docker.sock"
    try:
        return APIClient(timeout=timeout, version="auto", max_pool_size=32, **settings)
    except (DockerException, RequestException) as error:
        raise _unreachable(error, str(settings["base_url"])) from error


def readable(path: Path) -> bool:
    """Can this process look into this directory?"""
    return path.is_dir() and os.access(path, os.R_OK | os.X_OK)


def _tell_pull(said: Mapping[str, Any], layers: dict[str, int], progress: Progress) -> None:
    """Report what one line of a pull adds."""
    if said.get("status") == "Downloading":
        layer, now = str(said.get("id")), int((said.get("progressDetail") or {}).get("current") or 0)
        progress.advance(size=max(0, now - layers.get(layer, 0)))
        layers[layer] = max(now, layers.get(layer, 0))
