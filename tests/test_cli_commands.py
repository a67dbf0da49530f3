"""The commands as a user meets them: what they print, what --json says, which exit code they end with."""

from __future__ import annotations

import os
import pty
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import services as bed
from commands import Home, InsideHome
from hypothesis import given
from hypothesis import strategies as st

from backupd.cli.failure import worst
from backupd.cli.output import printable, seconds, size

CONFIG = """
[repository]
location = "repo"
[defaults]
retention = { last = 1 }
[sources.data]
driver = "volume"
path = "data"
[sources.other]
driver = "volume"
path = "other"
[stacks.both]
sources = ["data", "other"]
"""
BINARY = bytes(range(256)) * 5000


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, two points of `data` and one of `other`; made once."""
    home = InsideHome(tmp_path_factory.mktemp("template"))
    for name in ("data", "other"):
        (home.path / name / "deep" / "er").mkdir(parents=True)
        (home.path / name / "a.txt").write_text(f"{name}\n")
    (home.path / "data" / "deep" / "binary").write_bytes(BINARY)
    (home.path / "data" / "link").symlink_to("a.txt")
    home.configure(CONFIG)
    home.ok("init")
    home.ok("backup", "both")
    (home.path / "data" / "b.txt").write_text("later\n")
    home.ok("backup", "data")
    return home.path


@pytest.fixture
def home(template: Path, tmp_path: Path) -> Home:
    """A copy to do as one likes with."""
    shutil.copytree(template, tmp_path / "home", symlinks=True)
    return InsideHome(tmp_path / "home")


# --- backup ------------------------------------------------------------------------------------------


def test_a_backup_says_what_it_made_and_says_it_in_json(home: Home) -> None:
    """A line a source: the point, its size, what was new, how long; or all of that as one document."""
    (home.path / "data" / "c.txt").write_text("x" * 1000)
    ended = home.ok("backup", "data")
    assert ended.out.startswith("data: point ")
    assert " new) in " in ended.out
    found = home.ok("backup", "both", "--json").json
    assert [o["source"] for o in found] == ["data", "other"]
    assert all(o["run"]["status"] == "ok" and o["error"] is None for o in found)
    assert found[0]["run"]["point"] in home.ok("list").out


def test_quiet_is_quiet(home: Home) -> None:
    """cron mails what is printed: nothing, when all is well."""
    ended = home.ok("backup", "--quiet")
    assert ended.out == ended.err == ""


def test_progress_goes_to_standard_error_in_plain_lines(home: Home) -> None:
    """So that results can be piped and logs stay readable: no bars, no escape codes."""
    ended = home.ok("backup", "data")
    assert "data: capturing" in ended.err
    assert "\x1b" not in ended.out + ended.err


def test_on_a_terminal_bars_are_drawn(home: Home) -> None:
    """Seen through a pseudo terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "backupd", "backup", "data"], cwd=home.path,
        env={**home.environment(), "TERM": "xterm"}, stdout=theirs, stderr=theirs, stdin=theirs,
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # the other side has closed
            break
        if not chunk:
            break
        seen += chunk
    os.close(ours)
    assert process.wait() == 0
    assert b"\x1b[" in seen
    assert b"point " in seen


def test_one_that_fails_keeps_none_of_the_others_from_being_done(home: Home) -> None:
    """Each failure is seen outside: its own lines, and the exit code of the worst."""
    shutil.rmtree(home.path / "data")
    ended = home.refused("backup", code=20)
    assert ended.message.startswith("data: ")
    assert "other: point" in ended.out
    found = home.run("backup", "--json").json
    assert [bool(o["error"]) for o in found] == [True, False]
    assert found[0]["error"]["exit_code"] == 20
    runs = {p["source"]: p for p in home.run("status", "--json").json}
    assert runs["data"]["failing"]
    assert not runs["other"]["failing"]


def test_a_run_with_warnings_ends_with_3(home: Home) -> None:
    """Another file system is mounted inside the tree: the rest is whole, and what was left out is named."""
    root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    script = 'mount -t tmpfs tmpfs data/deep/er && exec "$@"'
    ended = home.run("backup", before=["unshare", "--mount", *root, "sh", "-c", script, "sh"])
    assert ended.code == 3, ended.err
    assert "  warning: " in ended.out
    assert "deep" in ended.out
    assert [p["last"]["status"] for p in home.ok("status", "--json").json] == ["warned", "ok"]
    assert home.ok("list", "data", "--json").json[-1]["warnings"]


@given(st.lists(st.sampled_from([0, 1, 2, 3, 10, 11, 12, 20, 21, 22, 23, 130])))
def test_no_failure_hides_behind_a_success(codes: list[int]) -> None:
    """0 only when all are 0, 3 only when none is worse, else the code of one that failed."""
    code = worst(codes)
    failures = [c for c in codes if c not in (0, 3)]
    if failures:
        assert code in failures
    else:
        assert code == (3 if 3 in codes else 0)


def test_an_empty_source_is_a_failure_until_someone_says_otherwise(home: Home) -> None:
    """A volume that was not mounted looks like this."""
    for path in sorted((home.path / "other").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert "--allow-shrink" in home.refused("backup", "other", code=20).hint
    assert home.run("backup", "other", "--allow-shrink").code == 0


# --- looking -----------------------------------------------------------------------------------------


def test_list_shows_points_and_their_times_can_be_handed_back(home: Home) -> None:
    """By source or stack, up to an instant; the table and the document say the same."""
    points = home.ok("list", "both", "--json").json
    assert [p["source"] for p in points] == ["data", "data", "other"]
    table = home.ok("list").out
    assert all(p["id"] in table and p["instant"] in table for p in points)
    up_to = home.ok("list", "data", "--at", points[0]["instant"], "--json").json
    assert [p["id"] for p in up_to] == [points[0]["id"]]
    assert home.ok("list", "data", "--at", "3 days ago").out == "no recovery points\n"


def test_window_shows_from_when_to_when(home: Home) -> None:
    """And from when all of them can be had."""
    points = home.ok("list", "--json").json
    found = home.ok("window", "--json").json
    assert found["data"] == {"first": points[0]["instant"], "last": points[1]["instant"], "points": 2}
    assert "all of them from" in home.ok("window").out


def test_status_shows_what_is_protected(home: Home) -> None:
    """Exit code 0 when all is well, 3 when a source is not protected or overdue."""
    assert home.ok("status").out.count(" ok") >= 2
    home.configure(CONFIG + '[sources.new]\ndriver = "volume"\npath = "x"\n')
    ended = home.run("status")
    assert ended.code == 3
    assert "UNPROTECTED" in ended.out
    home.configure(CONFIG.replace("[defaults]", '[defaults]\nschedule = "* * * * *"'))
    assert home.run("status", "--json").json[0]["next"]


def test_status_knows_what_the_repository_knows(home: Home) -> None:
    """The history lies beside the agent and may be lost; the recovery points tell their age themselves."""
    shutil.rmtree(home.path / "state")
    found = home.ok("status", "--json").json
    assert [bool(p["point"]) for p in found] == [True, True]
    assert found[0]["last"] is None


def test_a_backup_is_made_even_where_no_history_can_be_kept(home: Home) -> None:
    """A read-only root must not cost the backup."""
    blocked = InsideHome(home.path, {"BACKUPD_STATE": "/dev/null/state"})
    ended = blocked.ok("backup", "data")
    assert "data: point" in ended.out


def test_a_command_that_was_killed_does_not_look_as_if_it_ran_on(home: Home) -> None:
    """Its record says RUNNING; the next command sees that nobody is there any more."""
    with (home.path / "data" / "endless").open("wb") as file:
        file.truncate(40 << 30)
    process = subprocess.Popen(
        [sys.executable, "-m", "backupd", "backup", "data"], cwd=home.path, env=home.environment(),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert "capturing" in process.stderr.readline()
    process.kill()
    process.communicate()
    (home.path / "data" / "endless").unlink()
    last = {p["source"]: p["last"] for p in home.run("status", "--json").json}["data"]
    assert last["status"] == "abandoned"


def test_check_tells_every_problem_at_once_each_with_its_fix(home: Home) -> None:
    """Repository and both sources are looked at, whatever the first of them says."""
    assert home.ok("check").out.count("ok ") == 4
    shutil.rmtree(home.path / "data")
    home.configure(CONFIG.replace('path = "other"', 'volume = "no-such-volume-here"'))
    ended = home.refused("check", code=1)
    assert "2 of 4 checks failed: data, other" in ended.message
    assert ended.out.count("hint: ") == 2
    found = home.run("check", "--json").json
    assert [f["where"] for f in found if f["problems"]] == ["data", "other"]


def test_check_touches_nothing(home: Home) -> None:
    """But for the lease it tries, which stays as a record of who held it last."""
    before = sorted(p for p in (home.path / "repo").rglob("*") if p.is_file())
    home.ok("check")
    after = sorted(p for p in (home.path / "repo").rglob("*") if p.is_file())
    assert {p.parent.name for p in set(after) - set(before)} <= {"leases"}


def test_config_shows_what_is_understood(home: Home) -> None:
    """Defaults filled in, paths absolute."""
    shown = home.ok("config").json
    assert shown["repository"]["location"] == str(home.path / "repo")
    assert shown["sources"]["data"]["retention"]["last"] == 1
    assert home.ok("config", "schema").json["title"] == "backupd.toml"


def test_a_plan_touches_nothing_and_leaves_nothing_out_in_silence(home: Home) -> None:
    """Where each source lands, how much earlier, how much; and who has no point at all."""
    points = home.ok("list", "--json").json
    plan = home.ok("plan", "both", "--at", points[1]["instant"], "--json").json
    assert [s["source"] for s in plan["steps"]] == ["data", "other"]
    assert plan["steps"][0]["skew"] == 0 < plan["steps"][1]["skew"]
    assert plan["size"] == sum(s["size"] for s in plan["steps"])
    home.configure(CONFIG + '[sources.new]\ndriver = "volume"\npath = "x"\n')
    assert "new is left out: it has no recovery point" in home.ok("plan", "--at", "latest").err
    assert "new has no recovery point" in home.refused("plan", "new", "--at", "latest", code=21).message
    assert "lands at" in home.refused("plan", "both", "--at", "latest", "--max-skew", "1ms", code=21).message
    home.ok("restore", "data", "--at", "latest", "--to", "dir:out")
    assert "expected to take" in home.ok("plan", "data", "--at", "latest").err


# --- into a point ------------------------------------------------------------------------------------


def test_ls_lists_like_ls(home: Home) -> None:
    """A level, a directory, everything below; by id, by its beginning, by source."""
    newest = home.ok("list", "data", "--json").json[-1]["id"]
    listed = home.ok("ls", newest[:6]).out
    assert listed == home.ok("ls", "data").out
    names = [line.split()[-1] for line in listed.splitlines()]
    assert {"a.txt", "b.txt", "deep"} <= set(names)
    assert "deep/binary" not in names
    assert "link -> a.txt" in listed
    assert "deep/binary" in home.ok("ls", "data", "deep").out
    everything = home.ok("ls", "-r", "data", "--json").json
    assert {"deep/er", "deep/binary", "link"} <= {m["name"] for m in everything}
    assert "no" in home.refused("ls", "data", "nothing-here", code=21).message


def test_cat_is_safe_for_bytes(home: Home) -> None:
    """Every byte value, as it is, through a pipe."""
    assert home.ok("cat", "data", "deep/binary").raw == BINARY


def test_export_is_what_tar_and_zstd_read(home: Home) -> None:
    """To a file or a pipe; never over a file that is there."""
    home.ok("export", "data", "out.tar.zst")
    to_pipe = home.ok("export", "data", "-").raw
    for given_ in ((home.path / "out.tar.zst").read_bytes(), to_pipe):
        plain = subprocess.run(["zstd", "-dc"], input=given_, capture_output=True, check=True).stdout
        (home.path / "unpacked").mkdir()
        subprocess.run(["tar", "-x"], input=plain, cwd=home.path / "unpacked", check=True)
        ended = subprocess.run(
            ["diff", "-r", "--no-dereference", "data", "unpacked"], cwd=home.path, check=False
        )
        assert ended.returncode == 0
        shutil.rmtree(home.path / "unpacked")
    home.refused("export", "data", "out.tar.zst", code=2)


def test_a_name_full_of_tricks_cannot_play_with_the_terminal(home: Home) -> None:
    """Escape sequences and line breaks in a file's name are shown, not obeyed."""
    (home.path / "data" / "\x1b[2Jevil\nname").touch()
    (home.path / "data" / os.fsdecode(b"\xff\xfe")).touch()
    home.ok("backup", "data")
    shown = home.ok("ls", "data").raw
    assert b"\x1b" not in shown
    assert b"\\x1b[2Jevil" in shown


@given(st.text())
def test_what_is_printed_can_be_printed(text: str) -> None:
    """Always UTF-8, never a control character but the tabs and line ends of our own."""
    shown = printable(text)
    shown.encode()
    assert all(c.isprintable() or c in "\n\t" for c in shown)


@given(st.integers(0, 10**16))
def test_sizes_are_short(count: int) -> None:
    """Three digits and a unit."""
    number, unit = size(count).split()
    assert len(number) <= 4
    assert unit in {"B", "kB", "MB", "GB", "TB", "PB"}


def test_spans_are_said_as_people_say_them() -> None:
    """Short ones in seconds, long ones in two units."""
    assert [seconds(s) for s in (0.44, 12.4, 200, 7300)] == ["0.4 s", "12 s", "3m 20s", "2h 1m"]


# --- prune and verify --------------------------------------------------------------------------------


def test_prune_shows_its_reasons_and_a_dry_run_removes_nothing(home: Home) -> None:
    """Then it does what it said."""
    dry = home.ok("prune", "--dry-run").out
    assert "REMOVE" in dry
    assert "no rule keeps it" in dry
    assert "1 of 3 points would be removed" in dry
    assert len(home.ok("list", "--json").json) == 3
    done = home.ok("prune", "--json").json
    assert [v["keep"] for v in done["verdicts"]] == [False, True, True]
    assert len(home.ok("list", "--json").json) == 2
    home.ok("verify", "--data", "100%")
    assert home.ok("cat", "data", "deep/binary").raw == BINARY


def test_prune_tells_what_it_repacks_and_what_goes_a_day_later(home: Home) -> None:
    """First as a dry run; `--max-unused 100%` repacks nothing."""
    assert "repacked" not in home.ok("prune", "--dry-run", "--max-unused", "100%").out
    dry = home.ok("prune", "--dry-run", "--max-unused", "0%")
    assert "packs would be repacked" in dry.out
    assert "would go a day after that" in dry.out
    told = home.ok("prune", "--dry-run", "--max-unused", "0%", "--json").json
    done = home.ok("prune", "--max-unused", "0%", "--json").json
    assert told["packs_repacked"] == done["packs_repacked"] > 0
    assert told["bytes_waiting"] == done["bytes_waiting"] > 0
    assert "go a day after that" in home.ok("prune", "--max-unused", "0%").out
    home.ok("verify", "--data", "100%")
    assert home.ok("cat", "data", "deep/binary").raw == BINARY
    assert home.run("prune", "--max-unused", "a lot").code == 2


def test_without_a_retention_nothing_is_pruned(home: Home) -> None:
    """No policy is no policy of removing."""
    home.configure(CONFIG.replace("retention = { last = 1 }", ""))
    assert "0 of 3 points were removed" in home.ok("prune").out


def test_verify_names_what_is_damaged(home: Home) -> None:
    """Exit code 22, and every damage by name; nothing else is said to be well."""
    assert "all well" in home.ok("verify", "--data", "100%").out
    pack = max((home.path / "repo" / "packs" / "data").rglob("*.zst"), key=lambda p: p.stat().st_size)
    pack.chmod(stat.S_IRUSR | stat.S_IWUSR)
    content = bytearray(pack.read_bytes())
    content[100] ^= 1
    pack.write_bytes(content)
    ended = home.run("verify", "data", "--data", "100")
    assert ended.code == 22
    assert "DAMAGED: " in ended.out
    assert home.run("verify", "--data", "100%", "--json").json["problems"]
    assert home.run("verify", "other", "--data", "100%").code == 0


# --- in a bucket -------------------------------------------------------------------------------------


def test_a_repository_in_a_bucket_is_used_like_any_other(home: Home, s3_server: bed.S3Server) -> None:
    """Made, filled, listed, checked, restored; and copied object by object into a directory it restores there."""
    bucket = s3_server.new_bucket()
    (home.path / "secret").write_text(f"{s3_server.secret_key}\n")
    home.configure(
        CONFIG.replace(
            'location = "repo"',
            f'location = "s3://{bucket}/pre/fix"\nendpoint_url = "{s3_server.endpoint}"\n'
            f'access_key_id = "{s3_server.access_key}"\nsecret_access_key_file = "secret"',
        )
    )
    home.ok("init")
    home.ok("backup", "both")
    home.ok("check")
    home.ok("restore", "both", "--at", "latest", "--to", "dir:out")
    assert (home.path / "out" / "data" / "deep" / "binary").read_bytes() == BINARY
    client = s3_server.client()
    for item in client.list_objects_v2(Bucket=bucket)["Contents"]:
        copy = home.path / "copy" / item["Key"].removeprefix("pre/fix/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(client.get_object(Bucket=bucket, Key=item["Key"])["Body"].read())
    home.ok("verify", "--data", "100%", "--repository", "copy")
    home.ok("restore", "data", "--at", "latest", "--to", "dir:again", "--repository", "copy")
    assert (home.path / "again" / "data" / "deep" / "binary").read_bytes() == BINARY


# --- without a file ----------------------------------------------------------------------------------


def test_two_variables_and_two_mounts_just_work(tmp_path: Path) -> None:
    """The contract of the containers before us: nothing to write, nothing to initialise."""
    for name in ("uploads", "config"):
        (tmp_path / "backup" / name).mkdir(parents=True)
        (tmp_path / "backup" / name / "file").write_text(name)
    (tmp_path / "backups").mkdir()
    env = {
        "BACKUPD_BACKUP_ROOT": str(tmp_path / "backup"), "BACKUPD_REPOSITORY": str(tmp_path / "backups"),
        "BACKUP_SCHEDULE": "0 2 * * 0", "RETENTION_DAYS": "7",
    }  # fmt: skip
    home = InsideHome(tmp_path, env)
    home.refused("list", code=10)
    assert list((tmp_path / "backups").iterdir()) == [], "what only reads has made a repository"
    home.ok("backup")
    assert [p["source"] for p in home.ok("list", "--json").json] == ["config", "uploads"]
    assert "keep" in home.ok("prune").out
    home.ok("restore", "--at", "latest", "--to", "dir:out")
    assert (tmp_path / "out" / "uploads" / "file").read_text() == "uploads"
    assert home.ok("config").json["sources"]["uploads"]["schedule"] == "0 2 * * SUN"
