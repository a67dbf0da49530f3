"""Fresh Docker containers on a private network, for one restore. `Engine` is the way to what is there."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from backupd.errors import CommandFailed, ContainerError, RestoreFailed
from backupd.model import Container, ContainerSpec, Progress, Silence
from backupd.sandbox.container import DockerContainer
from backupd.sandbox.engine import ContainerInfo, Engine, Mount, asking

__all__ = ["ContainerInfo", "DockerContainer", "DockerSandbox", "Engine", "Mount"]

SANDBOX = "backupd.sandbox"
SOURCE = "backupd.source"
NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}")
PROBE = 10.0  # seconds for one look at whether a service is ready
UNTIL = """n=$1; shift
until "$@"; do n=$((n - 1)); [ $n -gt 0 ] || exit 1; sleep 0.2 2>/dev/null || sleep 1; done"""
"""Runs a `ready` program until it ends with 0, at most so many times: to begin an exec takes the engine a tenth of a
second of processor time, which a service that is getting ready needs itself."""
TRIES = 10
PAUSE = 0.2  # seconds between two such looks


class DockerSandbox:
    """Implements `model.Sandbox`.

    Everything it makes carries the label `backupd.sandbox=<name>`, and that label is all it goes by: it can
    be found again by another process, and `destroy` touches nothing else. The name is free, or ContainerError
    is raised by the first `create`.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        *,
        progress: Progress | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        if not NAME.fullmatch(name):
            raise ContainerError(
                f"{name!r} cannot be the name of a sandbox", hint="letters, digits, '.', '_' and '-'"
            )
        self._engine = engine
        self._name = name
        self._progress = progress or Silence()
        self._labels = {**(labels or {}), SANDBOX: name}
        self._claimed = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def network(self) -> str:
        """The name of its private network."""
        return f"backupd-{self._name}"

    # --- finding -------------------------------------------------------------------------------------

    @classmethod
    def names(cls, engine: Engine) -> list[str]:
        """The sandboxes there are on this engine."""
        with asking("list the sandboxes"):
            containers = engine.api.containers(all=True, filters={"label": SANDBOX})
            networks = engine.api.networks(filters={"label": SANDBOX})
            volumes = engine.api.volumes(filters={"label": SANDBOX}).get("Volumes") or ()
        return sorted({thing["Labels"][SANDBOX] for thing in (*containers, *networks, *volumes)})

    @classmethod
    def find(cls, engine: Engine, name: str) -> DockerSandbox:
        """An existing sandbox. Raises ContainerError when there is none of this name."""
        names = cls.names(engine)
        if name not in names:
            there = f"there are {', '.join(names)}" if names else "there is none"
            raise ContainerError(f"there is no sandbox {name!r}", hint=there)
        found = cls(engine, name)
        found._claimed = True
        return found

    def containers(self) -> dict[str, DockerContainer]:
        """Source -> its container."""
        with asking("list the containers of the sandbox"):
            rows = self._engine.api.containers(all=True, filters=self._mine())
        return {row["Labels"].get(SOURCE, ""): self._engine.container(row["Id"]) for row in rows}

    # --- making --------------------------------------------------------------------------------------

    def create(self, source: str, spec: ContainerSpec) -> Container:
        """Made, not started; on the private network its host name is `source`.

        Raises ContainerError when the sandbox's name is taken, or the image cannot be had.
        """
        self._claim()
        image = self._image(spec)
        labels = {**self._labels, SOURCE: source}
        api = self._engine.api
        with asking(f"make a container for {source}"):
            binds = {}
            for number, path in enumerate(spec.volumes):
                volume = api.create_volume(f"{self.network}-{source}-{number}", labels=labels)
                binds[volume["Name"]] = {"bind": path, "mode": "rw"}
            ports: dict[str, Any] = {f"{spec.port}/tcp": ("127.0.0.1", None)} if spec.port else {}
            made = api.create_container(
                image,
                list(spec.command) or (None if spec.service else ["true"]),
                name=f"{self.network}-{source}",
                hostname=source[:63],
                environment=dict(spec.env),
                labels=labels,
                ports=list(ports),
                host_config=api.create_host_config(binds=binds, port_bindings=ports),
                networking_config=api.create_networking_config(
                    {self.network: api.create_endpoint_config(aliases=[source])}
                ),
            )
        return self._engine.container(made["Id"])

    def _image(self, spec: ContainerSpec) -> str:
        """The spec's image, pulled if need be. A container that never runs may be of any image."""
        if not spec.service and not self._engine.image_present(spec.image):
            any_image = self._engine.any_image()
            if any_image is not None:
                return any_image
        self._engine.ensure_image(spec.image, progress=self._progress)
        return spec.image

    def _claim(self) -> None:
        """Take the name, once. The network is made first: it stands for the sandbox."""
        if self._claimed:
            return
        if self._name in self.names(self._engine):
            raise ContainerError(
                f"there is a sandbox {self._name!r} already", hint="choose another name, or remove that one"
            )
        with asking(f"make the network {self.network}", hint="choose another name for the sandbox"):
            self._engine.api.create_network(
                self.network, driver="bridge", labels=self._labels, check_duplicate=True
            )
        self._claimed = True

    def wait_ready(
        self,
        container: Container,
        spec: ContainerSpec,
        *,
        timeout: float = 120.0,
        moving: Callable[[], str] = str,
    ) -> None:
        """Run the spec's `ready` program until it ends with 0; `moving` is asked every second or two.

        Raises RestoreFailed with the container's last lines when it has ended, or has neither got ready nor
        moved for `timeout` seconds.
        """
        mine = self._engine.container(container.name)
        deadline = time.monotonic() + timeout
        said, place = "", ""
        while True:
            if not mine.running:
                raise RestoreFailed(
                    f"{mine.name} ended with status {mine.exit_code} before it was ready{_quoted(mine)}",
                    hint=f"docker logs {mine.name}",
                )
            if not spec.ready:
                return
            try:
                for _ in mine.exec(("sh", "-c", UNTIL, "sh", str(TRIES), *spec.ready), timeout=PROBE):
                    pass
            except (CommandFailed, ContainerError) as error:  # it may just be ending: looked at above
                said = error.message
            else:
                return
            if (now := moving()) != place:
                place, deadline = now, time.monotonic() + timeout
            if time.monotonic() > deadline:
                how = (
                    f"stood still for {timeout:.0f} s, {place}"
                    if place
                    else f"was not ready after {timeout:.0f} s"
                )
                raise RestoreFailed(
                    f"{mine.name} {how}: {said}{_quoted(mine)}",
                    hint=f"docker logs {mine.name}",
                )
            time.sleep(PAUSE)  # where no program can be begun, nothing else keeps this loop from spinning

    # --- removing ------------------------------------------------------------------------------------

    def destroy(self) -> None:
        """Containers, volumes and network: all that carries this sandbox's label, and nothing else.

        Nothing at all where this object neither made the sandbox nor found it: a `create` that was refused
        because the name is taken must not cost another restore its data.
        Does what it can, then raises ContainerError naming what would not go.
        """
        if not self._claimed:
            return
        api = self._engine.api
        left: list[str] = []
        with asking(f"list what belongs to the sandbox {self._name}"):
            containers = api.containers(all=True, filters=self._mine())
            networks = api.networks(filters=self._mine())
            volumes = api.volumes(filters=self._mine()).get("Volumes") or ()
        for row in containers:
            with _noting(left, f"container {row['Names'][0].lstrip('/')}"):
                api.remove_container(row["Id"], force=True, v=True)
        for row in volumes:
            with _noting(left, f"volume {row['Name']}"):
                api.remove_volume(row["Name"])
        for row in networks:
            with _noting(left, f"network {row['Name']}"):
                api.remove_network(row["Id"])
        if left:
            raise ContainerError(
                f"parts of the sandbox {self._name} could not be removed: {'; '.join(left)}",
                hint="disconnect what is not backupd's from it, then try again",
            )
        self._claimed = False

    def _mine(self) -> dict[str, str]:
        return {"label": f"{SANDBOX}={self._name}"}


def _quoted(container: DockerContainer) -> str:
    """The container's last lines, indented, or nothing where they cannot be had."""
    with contextlib.suppress(ContainerError):
        lines = container.logs(10).splitlines()
        return "".join(f"\n  {line}" for line in lines)
    return ""


@contextlib.contextmanager
def _noting(left: list[str], what: str) -> Iterator[None]:
    """One thing that will not go must not keep the others."""
    from docker.errors import NotFound

    try:
        with asking(f"remove the {what}"), contextlib.suppress(NotFound):
            yield
    except ContainerError as error:
        left.append(error.message)
