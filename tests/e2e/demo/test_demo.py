"""`backupd demo`: the whole story, as a user starts it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files that PostgreSQL's own user may pass through, as /tmp is."""
    with tempfile.TemporaryDirectory(prefix="backupd-test-") as folder:
        Path(folder).chmod(0o711)
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


SERVICES = ("orders", "sessions", "vectors", "uploads")


def _tell(*options: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "backupd", "demo", *options]
    return subprocess.run(argv, capture_output=True, text=True, timeout=240, check=False)


def _left(client: docker.DockerClient, tmp: Path, said: str) -> list[str]:
    """What the demo that said this left behind."""
    ours: dict[str, str | list[str] | bool] = {"label": "backupd.sandbox"}
    things: list[Any] = [*client.containers.list(all=True, filters=ours, ignore_removed=True)]
    things += [*client.volumes.list(filters=ours), *client.networks.list(filters=ours)]
    names = [str(thing.name) for thing in things]
    mine = set(re.findall(r"demo-[0-9a-f]{6}", said))
    found = [name for name in names if any(token in name for token in mine)]
    return found + [path.name for path in tmp.glob("backupd-demo-*")]


@pytest.mark.parametrize("options", [(), ("--embedded",)], ids=["containers", "embedded"])
def test_the_demo_brings_every_service_back_to_the_instant_and_leaves_nothing(
    options: tuple[str, ...], docker_client: docker.DockerClient, place: Path
) -> None:
    """Each service is compared with pictures taken before; a second state in between must not shine through."""
    ended = _tell(*options)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for service in SERVICES:
        assert re.search(rf"{service} +all [\d,]+ equal", ended.stdout), ended.stdout
        assert re.search(rf"{service} +differs in [1-9]", ended.stdout), ended.stdout
    assert "$ backupd restore productdemo --at 20" in ended.stdout
    assert _left(docker_client, place, ended.stdout) == []


def test_an_interrupted_demo_leaves_nothing(docker_client: docker.DockerClient, place: Path) -> None:
    """SIGTERM in the middle: an error code, and no container, volume or file."""
    demo = subprocess.Popen(
        [sys.executable, "-m", "backupd", "demo"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert demo.stdout is not None
    said = ""
    for line in demo.stdout:
        said += line
        if "$ backupd backup" in line:
            break
    time.sleep(0.3)
    demo.send_signal(signal.SIGTERM)
    said += demo.stdout.read()
    assert demo.wait(60) == 130, said
    assert "demo-" in said
    assert _left(docker_client, place, said) == []


def test_a_service_that_came_back_wrong_fails_the_demo() -> None:
    """The comparison is the demo's point: it must be able to say no."""
    from backupd.demo.picture import Picture

    before = Picture("two things", {"a": "1", "b": "2"})
    assert before.differences(Picture("", {"a": "1", "b": "2"})) == []
    assert before.differences(Picture("", {"a": "1", "b": "3"})) == ["b"]
    assert before.differences(Picture("", {"a": "1"})) == ["b"]
    assert before.differences(Picture("", {"a": "1", "b": "2", "c": "3"})) == ["c"]
