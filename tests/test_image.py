"""The agent's image, built from the Dockerfile and run as its readers will run it."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import services as bed

SECOND = 1_000_000_000

HARDENED: dict[str, Any] = {
    "read_only": True,
    "tmpfs": {"/tmp": ""},
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
    "healthcheck": {"interval": SECOND, "timeout": 5 * SECOND, "retries": 3, "start_period": 15 * SECOND},
}


@pytest.fixture(scope="module")
def agent(agent_image: str, module_services: bed.Services) -> Iterator[bed.Service]:
    """A running agent without a configuration, as it replaces a hand-made backup container."""
    data, backups = module_services.volume(), module_services.volume()
    service = module_services.container(
        agent_image,
        env={"BACKUP_SCHEDULE": "* * * * *", "RETENTION_DAYS": "7"},
        volumes={data: "/backup/uploads", backups: "/backups"},
        start=False,
        **HARDENED,
    )
    put(service, "/backup/uploads", {"notes.txt": b"first", "deep/er/file": b"x" * 100_000})
    service.container.start()
    yield service


def put(service: bed.Service, folder: str, files: dict[str, bytes], mode: int = 0o644) -> None:
    """Write files that belong to root."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), mode
            archive.addfile(member, io.BytesIO(content))
    assert service.container.put_archive(folder, buffer.getvalue())


def wait_for(found: Callable[[], bool], seconds: float, service: bed.Service, what: str) -> None:
    """Wait; a failure shows what the container wrote."""
    bed.wait_until(
        found,
        timeout=seconds,
        what=what,
        details=lambda: service.container.logs(tail=30).decode(errors="replace"),
    )


def run(image: str, services: bed.Services, *command: str, **options: Any) -> str:
    """What a command of the image prints; it must end well."""
    made = services.container(image, command, **options).container
    code = made.wait(timeout=60)["StatusCode"]
    said = made.logs().decode()
    assert code == 0, said
    return str(said)


def test_a_command_runs_instead_of_the_agent(agent_image: str, services: bed.Services) -> None:
    """`docker run backupd --version` needs no configuration, no network and no writable root."""
    said = run(agent_image, services, "--version", network_mode="none", **HARDENED)
    assert "backupd" in said


def test_every_postgres_client_runs(agent_image: str, services: bed.Services) -> None:
    """pg_dump, pg_restore and psql of each major version start, with the libraries they are linked to."""
    script = "for v in 14 15 16 17 18; do for c in pg_dump pg_dumpall pg_restore psql pg_basebackup; do "
    script += "/usr/lib/postgresql/$v/bin/$c --version || exit 1; done; done; pg_dump --version"
    said = run(agent_image, services, "-c", script, entrypoint="/bin/sh", **HARDENED).splitlines()
    majors = [line.split()[-1].partition(".")[0] for line in said]
    assert majors == [v for v in ("14", "15", "16", "17", "18") for _ in range(5)] + ["18"]


def test_nothing_of_the_build_is_left(agent_image: str, services: bed.Services) -> None:
    """No compiler, no pip, no sources, no package lists: less to patch, less to abuse."""
    script = "ls -d /src /image /var/lib/apt/lists/*_Packages /opt/backupd/bin/pip 2>/dev/null; command -v gcc; true"
    assert run(agent_image, services, "-c", script, entrypoint="/bin/sh").strip() == ""


def test_the_agent_is_nobody_and_has_an_init(agent: bed.Service) -> None:
    """PID 1 reaps and passes signals on; the agent has a user of its own and cannot write to its root."""
    assert agent.exec("cat", "/proc/1/comm").strip() == "tini"
    assert agent.exec("id", "-u").strip() == "10001"
    code, _ = agent.container.exec_run(["touch", "/opt/backupd/x"], user="0")
    assert code != 0


def test_the_agent_reports_itself_healthy(agent: bed.Service) -> None:
    """The image's own health check asks /healthz."""

    def healthy() -> bool:
        agent.container.reload()
        status = agent.container.attrs["State"]["Health"]["Status"]
        assert status != "unhealthy", agent.container.attrs["State"]["Health"]["Log"]
        return bool(status == "healthy")

    wait_for(healthy, 30, agent, "a healthy agent")


def points(agent: bed.Service) -> list[dict[str, Any]]:
    """The recovery points, as `backupd list --json` tells them."""
    found: list[dict[str, Any]] = json.loads(agent.exec("backupd", "list", "--json"))
    return found


def backed_up(agent: bed.Service, source: str) -> bool:
    code, output = agent.container.exec_run(["backupd", "list", "--json"])
    return code == 0 and f'"{source}"'.encode() in output


def test_two_variables_and_a_mount_are_enough(agent: bed.Service) -> None:
    """BACKUP_SCHEDULE, RETENTION_DAYS and /backup/*: the schedule fires, and what it made can be read back."""

    wait_for(lambda: backed_up(agent, "uploads"), 90, agent, "a first backup")
    point = points(agent)[0]
    assert point["source"] == "uploads"
    assert agent.exec("backupd", "cat", point["id"], "notes.txt") == "first"


def test_docker_stop_ends_the_agent_at_once(agent_image: str, services: bed.Services) -> None:
    """SIGTERM reaches the agent through the init; an idle one does not wait to be killed."""
    made = services.container(
        agent_image,
        env={"BACKUP_SCHEDULE": "0 3 * * *"},
        volumes={services.volume(): "/backup/data"},
        start=False,
        **HARDENED,
    )
    put(made, "/backup/data", {"file": b"something"})
    made.container.start()
    wait_for(lambda: backed_up(made, "data"), 90, made, "the first backup, which begins at once")
    started = time.monotonic()
    made.container.stop(timeout=30)
    assert time.monotonic() - started < 25
    made.container.reload()
    assert made.container.attrs["State"]["ExitCode"] == 0


@pytest.mark.parametrize("allowed", [False, True], ids=["as nobody", "as documented"])
def test_what_only_root_may_read_needs_two_capabilities(
    agent_image: str, services: bed.Services, allowed: bool
) -> None:
    """Root, of all its powers left with two, reads everything; the image's own user names what it could not."""
    options = dict(HARDENED)
    if allowed:
        options |= {"user": "0:0", "cap_add": ["DAC_READ_SEARCH", "DAC_OVERRIDE"]}
    volumes = {services.volume(): "/backup/private"}
    made = services.container(agent_image, ["backup"], volumes=volumes, start=False, **options)
    put(made, "/backup/private", {"open": b"for all"})
    put(made, "/backup/private", {"key": b"secret"}, mode=0o600)
    made.container.start()
    code = made.container.wait(timeout=60)["StatusCode"]
    said = made.container.logs().decode()
    assert code == (0 if allowed else 3), said
    assert ("key" in said) is not allowed, said
