"""Bad input, from outside: one line that says what happened, a hint, the documented exit code, nothing half-done."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import services as bed
from commands import Home, InsideHome
from conftest import StartService

VOLUME = """
[repository]
location = "repo"
[sources.data]
driver = "volume"
path = "data"
[stacks.shop]
sources = ["data"]
"""


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """One directory to protect, configured; no repository yet."""
    made = InsideHome(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("hello\n")
    made.configure(VOLUME)
    return made


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once: two processes a test add up."""
    made = InsideHome(tmp_path_factory.mktemp("template"))
    (made.path / "data").mkdir()
    (made.path / "data" / "a.txt").write_text("hello\n")
    made.configure(VOLUME)
    made.ok("init")
    made.ok("backup")
    return made.path


@pytest.fixture
def backed_up(template: Path, tmp_path: Path) -> Home:
    """The same with a repository and one recovery point."""
    shutil.copytree(template, tmp_path / "home")
    return InsideHome(tmp_path / "home")


def test_five_mistakes_in_a_configuration_are_all_told(home: Home) -> None:
    """Each with its key and its fix, exit code 2, and nothing was begun."""
    home.configure(
        """
        [repository]
        location = "repo"
        colour = "red"
        [defaults]
        schedule = "0 2 * *"
        timezone = "Europe/Berln"
        [sources.data]
        driver = "volum"
        [sources.cache]
        driver = "redis"
        url = "redis://h"
        password_file = "/nonexistent/secret"
        [stacks.shop]
        sources = ["dta"]
        """
    )
    ended = home.run("backup")
    assert ended.code == 2
    assert "backupd.toml has 6 mistakes" in ended.message
    for key, fix in (
        ("repository.colour: unknown key", "there are location"),
        ("defaults.schedule: '0 2 * *' has 4 fields", "minute, hour, day of month, month, weekday"),
        ("defaults.timezone: 'Europe/Berln' is not a time zone", 'did you mean "Europe/Berlin"?'),
        ('sources.data.driver: there is no driver "volum"', 'did you mean "volume"?'),
        ("sources.cache.password_file: /nonexistent/secret cannot be read", "does the secret exist"),
        ('stacks.shop.sources.0: there is no source "dta"', 'did you mean "data"?'),
    ):
        assert key in ended.err
        assert fix in ended.err
    assert not (home.path / "repo").exists()
    assert not (home.path / "state").exists()


@pytest.mark.parametrize(
    ("argv", "said", "hinted"),
    [
        (["bakup"], 'there is no command "bakup"', 'did you mean "backup"?'),
        (["backup", "dta"], "there is no source or stack 'dta'", 'did you mean "data"?'),
        (["backup", "--fast"], "no such option", "--help"),
        (["-c", "none.toml", "backup"], "there is no configuration none.toml", "backupd init"),
        (["plan"], "--at is needed", "--at latest"),
        (["restore", "--at", "latest", "--point", "x"], "exclude each other", ""),
        (["verify", "--data", "lots"], "'lots' is no share", "5%"),
        (["ls"], "missing argument", "--help"),
        ([], "a command is needed", "--help"),
        (["sandbox", "remove"], "which sandbox?", "backupd sandbox"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_what_cannot_be_asked_for_is_refused(home: Home, argv: list[str], said: str, hinted: str) -> None:
    """Exit code 2, with the nearest thing that can be."""
    ended = home.refused(*argv, code=2)
    assert said in ended.message
    assert hinted in ended.hint


@pytest.mark.parametrize(
    ("argv", "said", "hinted"),
    [
        (["restore", "dta", "--at", "latest"], "there is no source or stack 'dta'", 'did you mean "data"?'),
        (["restore", "--at", "teatime"], "'teatime' is not a time", "2 hours ago"),
        (["restore", "--at", "2999-01-01"], "is in the future", "latest"),
        (["restore", "--at", "latest", "--to", "cloud"], "--to 'cloud' is no place", "dir:PATH"),
        (["restore", "--at", "latest", "--max-skew", "soon"], "is not a duration", "60s"),
        (["restore", "--at", "latest", "--to", "dir:data"], None, None),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_restore_that_makes_no_sense_is_refused(
    backed_up: Home, argv: list[str], said: str | None, hinted: str | None
) -> None:
    """Before anything is touched."""
    before = sorted(p.name for p in backed_up.path.iterdir())
    if said is None:
        (backed_up.path / "data" / "data").mkdir()
        (backed_up.path / "data" / "data" / "mine").write_text("x")
        said, hinted = "is not empty", "never writes over anything"
    ended = backed_up.refused(*argv, code=2)
    assert said in ended.message
    assert hinted is not None
    assert hinted in ended.hint
    assert sorted(p.name for p in backed_up.path.iterdir()) == before


def test_an_instant_before_the_first_point_is_refused_with_the_window(backed_up: Home) -> None:
    """Exit code 21; the message says from when to when, the hint what to write instead."""
    first = backed_up.ok("list", "--json").json[0]["instant"]
    ended = backed_up.refused("restore", "--at", "3 days ago", "--to", "dir:out", code=21)
    assert f"data can be restored from {first} to {first}" in ended.message
    assert ended.hint.endswith(f"--at {first}")
    assert not (backed_up.path / "out").exists()
    assert backed_up.run("restore", "--at", first, "--to", "dir:out").code == 0


def test_a_point_that_is_not_there_is_refused(backed_up: Home) -> None:
    """By whatever command asks for it."""
    for argv in (("restore", "--point", "beef"), ("ls", "beef"), ("cat", "beef", "a"), ("export", "beef")):
        assert "no recovery point" in backed_up.refused(*argv, code=21).message
    assert "no" in backed_up.refused("cat", "data", "b.txt", code=21).message


@pytest.mark.parametrize(
    "command", ["backup", "list", "status", "prune", "verify", "plan --at latest", "ls data"]
)
def test_without_a_repository_every_command_says_so(home: Home, command: str) -> None:
    """Exit code 10, and `init` as the hint; none of them makes one by the way."""
    ended = home.refused(*command.split(), code=10)
    assert "backupd init" in ended.hint
    assert not (home.path / "repo").exists()


def test_an_empty_directory_is_not_a_repository(home: Home) -> None:
    """A disk that is not mounted looks just like this."""
    (home.path / "repo").mkdir()
    assert "is the disk mounted" in home.refused("backup", code=10).hint
    assert list((home.path / "repo").iterdir()) == []


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_server_that_does_not_answer_is_told_and_leaves_no_point(home: Home) -> None:
    """Redis is not there; the volume beside it is backed up all the same, and the exit code is the failure's."""
    port = _closed_port()
    home.configure(f'{VOLUME}\n[sources.cache]\ndriver = "redis"\nurl = "redis://127.0.0.1:{port}/0"')
    home.ok("init")
    ended = home.refused("backup", code=20)
    assert str(port) in ended.message
    assert [p["source"] for p in home.ok("list", "--json").json] == ["data"]
    found = home.run("check", "--json")
    assert found.code == 1
    status = home.run("status")
    assert status.code == 3
    assert "UNPROTECTED" in status.out


def test_a_wrong_password_is_told_and_never_shown(home: Home, start_redis: StartService) -> None:
    """The server's refusal, a hint, exit code 20, and the password nowhere."""
    server = start_redis(password="right-password")
    home.configure(
        f'{VOLUME}\n[sources.cache]\ndriver = "redis"\nurl = "redis://{server.host}:{server.port}/0"\n'
        'password = "wrong-password"'
    )
    home.ok("init")
    ended = home.refused("backup", "cache", code=20)
    assert "password" in (ended.message + ended.hint).lower()
    everything = ended.out + ended.err + home.run("check").out + home.ok("config").out
    everything += "".join(str(r) for r in home.run("status", "--json").json)
    assert "wrong-password" not in everything
    assert home.ok("list", "--json").json == []


def s3(server: bed.S3Server, bucket: str, *, secret: str = "") -> str:
    return f"""
        [repository]
        location = "s3://{bucket}/p"
        endpoint_url = "{server.endpoint}"
        access_key_id = "{server.access_key}"
        secret_access_key = "{secret or server.secret_key}"
        [sources.data]
        driver = "volume"
        path = "data"
        """


def test_a_bucket_that_is_not_there_is_told(home: Home, s3_server: bed.S3Server) -> None:
    """It is never made: a misspelt name must not become a second repository."""
    home.configure(s3(s3_server, "no-such-bucket"))
    for command in ("init", "backup"):
        ended = home.refused(command, code=1)
        assert "no bucket no-such-bucket" in ended.message
    (home.path / "backupd.toml").unlink()
    made = Home(home.path, {"AWS_ENDPOINT_URL": s3_server.endpoint, "AWS_ACCESS_KEY_ID": s3_server.access_key,
                            "AWS_SECRET_ACCESS_KEY": s3_server.secret_key})  # fmt: skip
    made.refused("init", "s3://no-such-bucket/p", code=1)
    assert not (home.path / "backupd.toml").exists(), "a location that cannot be was left behind in a file"
    names = [b["Name"] for b in s3_server.client().list_buckets()["Buckets"]]
    assert "no-such-bucket" not in names


def test_a_wrong_key_for_the_bucket_is_told_and_never_shown(home: Home, s3_server: bed.S3Server) -> None:
    """The store's refusal, exit code 1."""
    home.configure(s3(s3_server, s3_server.new_bucket(), secret="not-the-secret-key"))
    ended = home.refused("init", code=1)
    assert "not-the-secret-key" not in ended.err + ended.out


def test_a_store_that_does_not_answer_is_told_at_once(home: Home) -> None:
    """A person waits seconds, not the minutes that an agent is patient for."""
    server = bed.S3Server(f"http://127.0.0.1:{_closed_port()}", "a", "b")
    home.configure(s3(server, "bucket"))
    begun = time.monotonic()
    ended = home.refused("backup", code=1)
    assert time.monotonic() - begun < 20
    assert "127.0.0.1" in ended.message


def test_a_full_disk_is_told_and_leaves_no_point(home: Home) -> None:
    """Half of the packs may be there; no manifest is, so there is no point, and the next run goes on from them."""
    (home.path / "repo").mkdir()
    (home.path / "data" / "big").write_bytes(os.urandom(6_000_000))
    root = os.geteuid() == 0
    small = ["unshare", "--mount", *([] if root else ["--user", "--map-root-user"]), "sh", "-c"]
    mount = 'mount -t tmpfs -o size=4m tmpfs repo && "$@"; code=$?; find repo -path "*points*" -type f; exit $code'
    assert home.run("init", before=[*small, mount, "sh"]).code == 0
    script = mount.replace('&& "$@"', f'&& {sys.executable} -m backupd -q init && "$@"')
    ended = home.refused("backup", code=1, before=[*small, script, "sh"])
    assert "no space" in ended.message.lower() or "full" in ended.message.lower()
    assert ended.out == "", "a manifest was written"


def test_without_a_container_engine_it_is_told(home: Home) -> None:
    """Only by what needs one."""
    made = Home(home.path, {"DOCKER_HOST": "unix:///nonexistent/docker.sock"})
    made.configure(f'{VOLUME}\n[sources.cache]\ndriver = "redis"\ncontainer = "c"')
    made.ok("init")
    made.ok("backup", "data")
    assert "container engine" in made.refused("backup", "cache", code=20).message
    assert "container engine" in made.refused("restore", "data", "--at", "latest", code=1).message


def test_errors_are_one_json_document_where_that_is_asked_for(home: Home) -> None:
    """What happened, what to do, the exit code; the lines for people stay on standard error."""
    ended = home.refused("backup", "--json", code=10)
    assert ended.json["error"]["exit_code"] == 10
    assert ended.json["error"]["message"] == ended.message
    assert ended.json["error"]["hint"] == ended.hint


def test_a_fault_of_our_own_is_no_traceback_unless_asked_for(home: Home) -> None:
    """`BACKUPD_DEBUG=1` shows it all."""
    (home.path / "sitecustomize.py").write_text(
        "import backupd.config\ndef broken(*a, **k): raise ZeroDivisionError('oops')\n"
        "backupd.config.load = broken\n"
    )
    made = Home(home.path, {"PYTHONPATH": str(home.path)})
    ended = made.refused("backup", code=1)
    assert "ZeroDivisionError: oops" in ended.message
    assert "BACKUPD_DEBUG=1" in ended.hint
    shown = subprocess.run(
        [sys.executable, "-m", "backupd", "backup"], cwd=home.path, capture_output=True, text=True, check=False,
        env={**made.environment(), "BACKUPD_DEBUG": "1"},
    )  # fmt: skip
    assert "Traceback" in shown.stderr


@pytest.mark.parametrize("after", [0, 0.003, 0.03, 1.0])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_it_cleanly_with_no_point(home: Home, number: signal.Signals, after: float) -> None:
    """Ctrl-C and SIGTERM: exit code 130, no traceback, no point, and the next backup is whole."""
    home.ok("init")
    with (home.path / "data" / "endless").open("wb") as file:
        os.posix_fallocate(
            file.fileno(), 0, 8 << 30
        )  # no hole, so it is read: seconds, and no byte was written
    process = subprocess.Popen(
        [sys.executable, "-m", "backupd", "backup"], cwd=home.path, env=home.environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    line = process.stderr.readline()
    assert "capturing" in line
    time.sleep(after)  # from the first moment on, to well into the reading, which takes seconds
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "backupd: interrupted" in err
    (home.path / "data" / "endless").unlink()
    assert home.ok("list", "--json").json == []
    home.ok("backup")
    runs = home.ok("status", "--json").json
    assert runs[0]["last"]["status"] == "ok"


def test_a_reader_that_goes_away_is_no_error_of_ours(backed_up: Home) -> None:
    """`backupd ls ... | head -1`."""
    for n in range(2000):
        (backed_up.path / "data" / f"{n:060}").touch()
    backed_up.ok("backup")
    ended = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m backupd ls data | head -1"], cwd=backed_up.path,
        env=backed_up.environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.stdout.count("\n") == 1
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr
