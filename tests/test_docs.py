"""What the documentation says to type works, in that order, as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from backupd.config import load
from backupd.drivers import postgres_physical, redis_pitr

ROOT = Path(__file__).parent.parent
NAMES = ("shop-db", "shop-cache")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def clean_engine(docker_client: docker.DockerClient) -> Iterator[docker.DockerClient]:
    """The names that the pages use are free before and after."""

    def sweep() -> None:
        for container in docker_client.containers.list(all=True, ignore_removed=True):
            if container.name in NAMES:
                container.remove(force=True, v=True)
        command = [sys.executable, "-m", "backupd", "sandbox", "remove", "monday"]
        subprocess.run(
            command, capture_output=True, check=False
        )  # fails where there is none, as it should be

    sweep()
    yield docker_client
    sweep()


def run_console(page: str, where: Path, *, only: str = "") -> str:
    """Every console block of a page in one shell, which stops at the first command that fails."""
    # `docker run` returns before its server answers: a person is slower than that, a script must wait.
    wait = """
docker() {
  command docker "$@" || return
  if [ "$1" = run ]; then settle; fi
}
backupd() {
  command backupd "$@" || return
  if [ "$1" = init ]; then  # what others run on this engine is corrected away, as the page says
    awk '/^\\[/ { keep = !/^\\[(sources|stacks)/ || /shop/ } keep' backupd.toml > corrected
    mv corrected backupd.toml
  fi
}
settle() {
  for _ in $(seq 200); do
    if ! command docker inspect shop-db >/dev/null 2>&1; then break; fi
    if command docker exec shop-db pg_isready -q -h 127.0.0.1; then break; fi
    sleep 0.1
  done
  sleep 1
}
"""
    script = "\n".join(["set -e", wait, *(block for block in blocks(page, "console") if only in block)])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=where, capture_output=True, text=True, check=False, timeout=280,
        env={**os.environ, "PATH": path, "BACKUPD_STATE": str(where / "state")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_the_ten_minutes_of_the_readme(clean_engine: docker.DockerClient, tmp_path: Path) -> None:
    said = run_console("README.md", tmp_path)
    assert said.count("apples") >= 4  # the order, the cart twice, the invoice
    assert "three apples" in said
    assert not [
        c
        for c in clean_engine.containers.list(all=True, ignore_removed=True)
        if (c.name or "").startswith("backupd-monday-")
    ]


def test_each_configuration_in_the_readme_is_one(tmp_path: Path) -> None:
    for secret in ("pg_password", "redis_password"):
        (tmp_path / secret).write_text("secret")
    for block in blocks("README.md", "toml"):
        text = block.replace("/run/secrets", str(tmp_path))
        (tmp_path / "backupd.toml").write_text(text)
        assert set(load(tmp_path / "backupd.toml", {}).sources) == set(tomllib.loads(text)["sources"])


def test_the_role_in_the_readme_is_the_one_that_is_tested() -> None:
    """test_postgres_physical makes it as the driver's documentation says."""
    about = postgres_physical.__doc__ or ""
    for line in (re.search(r"CREATE ROLE .*;", about), re.search(r"host replication .*", about)):
        assert line
        assert line[0] in (ROOT / "README.md").read_text()


def test_the_rights_for_redis_are_those_that_are_tested() -> None:
    """test_redis_pitr gives them as the driver's documentation says; README and schedule have the same line."""
    line = re.search(r"ACL SETUSER .*", redis_pitr.__doc__ or "")
    assert line
    for page in ("README.md", "schedules/redis-to-the-second.toml"):
        assert line[0] in (ROOT / page).read_text()


def test_every_command_the_readme_names_exists() -> None:
    commands = set(re.findall(r"^backupd ([a-z]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert len(commands) > 8
    for name in sorted(commands):
        done = subprocess.run(
            [sys.executable, "-m", "backupd", name, "--help"], capture_output=True, check=False
        )
        assert done.returncode == 0, name


def test_every_link_in_the_documentation_leads_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("*/**/*.md")]:
        if ".venv" in page.parts:
            continue
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_exit_codes_in_the_readme_are_those_of_the_errors() -> None:
    from backupd import errors

    told = {int(code) for code in re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)}
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    given = {c.exit_code for c in classes if issubclass(c, errors.BackupdError)}
    assert given | {0, 3} == told
