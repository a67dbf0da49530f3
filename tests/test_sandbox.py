"""The Docker engine: streams both ways, helpers, files, ports, and sandboxes that leave nothing behind."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import docker
import pytest
import services as bed
from hypothesis import given
from hypothesis import strategies as st

from backupd.errors import BackupdError, CommandFailed, ContainerError, Damaged, Interrupted, RestoreFailed
from backupd.model import ContainerSpec, Silence
from backupd.sandbox.container import DockerContainer, _nanoseconds
from backupd.sandbox.docker import DockerSandbox, Engine
from backupd.sandbox.engine import kernel_of
from backupd.sandbox.wire import BLOCK, Demultiplexer, in_blocks

StartService = Callable[..., bed.Service]
ENGINE = Engine()
SLEEPER = ("sleep", "1000")


@pytest.fixture(scope="module")
def box(module_services: bed.Services) -> DockerContainer:
    """A container in which programs are run; nothing of it is changed."""
    return ENGINE.container(module_services.container(bed.REDIS_IMAGE, SLEEPER, init=True).name)


@pytest.fixture
def sandbox_name() -> Iterator[str]:
    """A name of which nothing is left afterwards, whatever happened."""
    name = f"test-{time.time_ns()}"
    yield name
    with contextlib.suppress(ContainerError):
        DockerSandbox.find(ENGINE, name).destroy()


@pytest.fixture
def sandbox(sandbox_name: str) -> DockerSandbox:
    """A sandbox of that name."""
    return DockerSandbox(ENGINE, sandbox_name, labels=bed.labels())


def sh(script: str) -> list[str]:
    """argv of a shell script."""
    return ["sh", "-c", script]


# --- programs in a container ----------------------------------------------------------------------------


def test_a_program_streams_both_ways_without_waiting_for_itself(box: DockerContainer) -> None:
    """More than all buffers in between hold, in and out at once; stdin ends, and with it the program."""
    pieces = [os.urandom(1 << 20) for _ in range(24)]
    assert b"".join(box.exec(["cat"], stdin=iter(pieces))) == b"".join(pieces)


def test_stdout_and_stderr_are_told_apart(box: DockerContainer) -> None:
    """What a program says beside its data is not data."""
    script = "for i in 1 2 3; do echo data; echo noise >&2; done; exit 0"
    assert b"".join(box.exec(sh(script))) == b"data\n" * 3


def test_a_bad_end_is_raised_after_the_last_byte(box: DockerContainer) -> None:
    """A stream that stops early looks like one that is complete."""
    received = b""
    with pytest.raises(CommandFailed, match=f"sh in {box.name} ended with status 3: disk full") as failure:
        for chunk in box.exec(sh("echo data; echo disk full >&2; exit 3")):
            received += chunk
    assert received == b"data\n"
    assert (failure.value.returncode, failure.value.stderr) == (3, "disk full")
    with pytest.raises(CommandFailed, match=r"signal 9 \(SIGKILL\)"):
        list(box.exec(sh("kill -9 $$")))


def test_quick_programs_lose_no_first_byte(box: DockerContainer) -> None:
    """The engine may answer and send output at once, while this process looks away."""
    for _ in range(5):
        gc.collect()
        assert b"".join(box.exec(["echo", "quick"])) == b"quick\n"


def test_a_program_that_is_not_there_is_told(box: DockerContainer) -> None:
    """The engine says so on the program's own output."""
    with pytest.raises(CommandFailed, match=r"nosuch.*not found"):
        list(box.exec(["nosuch"]))


def test_secrets_travel_in_the_environment_only(box: DockerContainer) -> None:
    """The program has it; the message of its failure does not."""
    assert list(box.exec(["printenv", "SECRET"], env={"SECRET": "hush"})) == [b"hush\n"]
    with pytest.raises(CommandFailed) as failure:
        list(box.exec(sh("exit 1"), env={"SECRET": "hush"}))
    assert "hush" not in failure.value.message + failure.value.stderr


def test_a_program_runs_as_the_user_asked_for(box: DockerContainer) -> None:
    """By name or number."""
    assert b"".join(box.exec(["id", "-u"], user="redis")).strip() == b"999"


def test_closing_early_ends_the_program(box: DockerContainer) -> None:
    """The engine has no call for that, and would let a dump run on for nobody; even one that ignores TERM."""
    output = box.exec(sh('trap "" TERM; echo $$; while :; do echo more; done'))
    pid = next(output).split()[0].decode()
    output.close()  # type: ignore[attr-defined]
    with pytest.raises(CommandFailed, match="No such process"):
        list(box.exec(sh(f"kill -0 {pid}")))


def test_a_source_that_breaks_ends_the_program_before_it_sees_an_end(box: DockerContainer) -> None:
    """Half of a dump must not be restored as if it were the whole."""

    def broken() -> Iterator[bytes]:
        yield b"first half"
        time.sleep(0.2)
        raise Damaged("a pack is not what it was")

    for _ in range(3):
        with pytest.raises(Damaged, match="a pack"):
            list(box.exec(sh("tee /tmp/half && touch /tmp/complete"), stdin=broken()))
    assert b"".join(box.exec(sh("cd /tmp; ls; cat half"))) == b"half\nfirst half"


def test_a_program_that_stops_reading_is_judged_by_its_status(box: DockerContainer) -> None:
    """`head` has what it wants; one that fails says so."""

    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield bytes(1 << 20)

    assert b"".join(box.exec(["head", "-c", "3"], stdin=endless())) == bytes(3)
    with pytest.raises(CommandFailed, match="status 4"):
        list(box.exec(sh("exit 4"), stdin=endless()))


def test_a_time_limit_is_kept(box: DockerContainer) -> None:
    """And the program is ended."""
    started = time.monotonic()
    with pytest.raises(CommandFailed, match=r"did not end within 0\.5 s"):
        list(box.exec(["sleep", "77"], timeout=0.5))
    assert time.monotonic() - started < 60
    assert b"77" not in b"".join(box.exec(sh("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")))


def test_several_programs_at_once(box: DockerContainer) -> None:
    """An engine serves threads."""
    results: list[int] = []

    def work() -> None:
        results.append(sum(map(len, box.exec(["head", "-c", "5000000", "/dev/zero"]))))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [5_000_000] * 6


def test_a_container_that_cannot_run_programs_says_so(start_container: StartService) -> None:
    """Stopped, paused, killed in the middle; and one that is not there."""
    stopped = ENGINE.container(start_container(bed.REDIS_IMAGE, SLEEPER, start=False).name)
    with pytest.raises(ContainerError, match="is not running"):
        list(stopped.exec(["true"]))
    assert not stopped.running
    stopped.start()
    stopped.pause()
    assert stopped.status == "paused"
    with pytest.raises(ContainerError, match="paused"):
        list(stopped.exec(["true"]))
    stopped.unpause()
    output = stopped.exec(sh("echo begun; sleep 1000"))
    assert next(output) == b"begun\n"
    stopped.stop(timeout=0)
    with pytest.raises(BackupdError):
        list(output)
    with pytest.raises(ContainerError, match="No such container") as failure:
        ENGINE.container("nosuch")
    assert "docker ps" in failure.value.hint


# --- files and ports ------------------------------------------------------------------------------------


def test_files_go_in_and_out_of_a_stopped_container(services: bed.Services) -> None:
    """As tars, into a volume too."""
    volume = services.volume()
    made = services.container(bed.REDIS_IMAGE, SLEEPER, volumes={volume: "/data"}, start=False)
    container = ENGINE.container(made.name)
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as out:
        entry = tarfile.TarInfo("deep/file")
        entry.size, entry.uid, entry.mode = 5, 4711, 0o640
        out.addfile(entry, io.BytesIO(b"hello"))
    container.write("/data", iter([tar.getvalue()[:700], tar.getvalue()[700:]]))
    back = io.BytesIO(b"".join(container.read("/data/deep")))
    with tarfile.open(fileobj=back) as got:
        member = got.getmember("deep/file")
        content = got.extractfile(member)
        assert content is not None
        assert (content.read(), member.uid, member.mode & 0o7777) == (b"hello", 4711, 0o640)
    with pytest.raises(ContainerError, match="/nosuch"):
        list(container.read("/nosuch"))

    def broken() -> Iterator[bytes]:
        yield tar.getvalue()[:600]
        raise Damaged("a pack is not what it was")

    with pytest.raises(Damaged):
        container.write("/data", broken())


def test_a_mount_is_found_behind_its_destination(services: bed.Services, tmp_path: Path) -> None:
    """A named volume, a bind, a directory inside of either; the innermost where they are nested."""
    volume = services.volume()
    (tmp_path / "inner" / "deep").mkdir(parents=True)
    made = services.container(bed.REDIS_IMAGE, SLEEPER, volumes={volume: "/srv", str(tmp_path): "/srv/bound"})
    container = ENGINE.container(made.name)
    list(container.exec(sh("mkdir /srv/sub; echo x > /srv/sub/file")))
    of_volume = ENGINE.volume_path(volume)
    assert of_volume is not None
    assert container.mount("/srv") == of_volume
    assert container.mount("/srv", whole=True) is None  # another lies below
    assert container.mount("/srv/bound", whole=True) == tmp_path
    assert container.mount("/srv/sub/") == of_volume / "sub"
    assert container.mount("/srv/bound") == tmp_path
    assert container.mount("/srv/bound/inner") == tmp_path / "inner"
    assert container.mount("/srv/nosuch") is None
    assert container.mount("/etc") is None
    assert container.mount("/srvbound") is None
    assert [user.name for user in ENGINE.volume_users(volume)] == [made.name]


def test_a_path_that_is_only_called_the_same_is_not_believed(
    services: bed.Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent in a container of its own has a /data too, but another one."""
    made = services.container(bed.REDIS_IMAGE, SLEEPER, volumes={str(tmp_path): "/data"})
    container = ENGINE.container(made.name)
    assert container.mount("/data") == tmp_path
    impostor = tmp_path.parent / "impostor"
    impostor.mkdir()
    attributes = container.inspect()
    for mount in attributes["Mounts"]:
        mount["Source"] = str(impostor)
    monkeypatch.setattr(container, "inspect", lambda: attributes)
    assert container.mount("/data") is None


def test_a_port_is_reached_where_it_is_published_else_on_the_network(services: bed.Services) -> None:
    """And where it is neither, the error says what to do."""
    published = services.redis()
    assert ENGINE.container(published.name).address(6379) == ("127.0.0.1", published.port)
    plain = services.container(bed.REDIS_IMAGE)
    found: list[tuple[str, int]] = []

    def reached() -> bool:
        with contextlib.suppress(ContainerError):
            found.append(ENGINE.container(plain.name).address(6379))
        return bool(found)

    bed.wait_until(reached, timeout=15, what="redis on its network")
    host, port = found[0]
    assert (host, port) == (plain.address, 6379)
    with socket.create_connection((host, port), timeout=2) as connection:
        connection.sendall(b"PING\r\n")
        assert connection.recv(7) == b"+PONG\r\n"
    lonely = services.container(bed.REDIS_IMAGE, network_mode="none")
    with pytest.raises(ContainerError, match="cannot be reached from here") as failure:
        ENGINE.container(lonely.name).address(6379)
    assert "publish" in failure.value.hint


def test_the_engine_lists_what_discovery_needs(services: bed.Services) -> None:
    """Name, image, labels, environment, mounts; a container's environment is in no repr: it holds secrets."""
    volume = services.volume()
    made = services.container(
        bed.REDIS_IMAGE, SLEEPER, env={"A": "b=c"}, volumes={volume: "/data"}, extra_labels={"x": "y"}
    )
    (info,) = [found for found in ENGINE.containers() if found.name == made.name]
    assert (info.image, info.status, info.labels["x"]) == (bed.REDIS_IMAGE, "running", "y")
    assert info.env["A"] == "b=c"
    assert [(m.kind, m.name, m.destination, m.writable) for m in info.mounts] == [
        ("volume", volume, "/data", True)
    ]
    assert "b=c" not in repr(info)
    with pytest.raises(ContainerError, match="nosuch"):
        ENGINE.volume_path("nosuch")


# --- helpers --------------------------------------------------------------------------------------------


def helpers(mark: str) -> list[str]:
    """Those whose command holds `mark`: other tests have helpers at the same time."""
    rows = ENGINE.api.containers(all=True, filters={"label": "backupd.helper=1"})
    return [row["Id"] for row in rows if mark in row["Command"]]


def test_a_helper_reads_and_writes_a_volume(services: bed.Services) -> None:
    """Streams both ways, then it is gone; read-only means it."""
    volume = services.volume()
    size = 20 << 20
    pieces = (bytes(1 << 20) for _ in range(20))
    list(
        ENGINE.run_helper(bed.REDIS_IMAGE, sh("cat > /v/file"), volumes={volume: ("/v", "rw")}, stdin=pieces)
    )
    back = ENGINE.run_helper(bed.REDIS_IMAGE, ["cat", "/v/file"], volumes={volume: ("/v", "ro")})
    assert sum(map(len, back)) == size
    with pytest.raises(CommandFailed, match="Read-only"):
        list(ENGINE.run_helper(bed.REDIS_IMAGE, sh("touch /v/x"), volumes={volume: ("/v", "ro")}))


def test_a_helper_is_removed_however_it_ends(services: bed.Services) -> None:
    """Badly, given up early, never started."""
    mark = f"mark{time.time_ns()}"
    with pytest.raises(CommandFailed, match="status 5: oh") as failure:
        list(ENGINE.run_helper(bed.REDIS_IMAGE, sh(f": {mark}; echo oh >&2; exit 5"), volumes={}))
    assert failure.value.returncode == 5
    output = ENGINE.run_helper(bed.REDIS_IMAGE, ["yes", mark], volumes={})
    next(output)
    assert len(helpers(mark)) == 1
    output.close()  # type: ignore[attr-defined]
    with pytest.raises(ContainerError, match="nosuch"):
        list(ENGINE.run_helper(bed.REDIS_IMAGE, ["nosuch", mark], volumes={}))
    assert helpers(mark) == []


def test_a_helper_whose_source_breaks_never_sees_an_end(services: bed.Services) -> None:
    """It is removed first: half of a tree must not be unpacked as if it were the whole."""
    volume, mark = services.volume(), f"mark{time.time_ns()}"

    def broken() -> Iterator[bytes]:
        yield b"first half"
        time.sleep(0.2)
        raise Damaged("a pack is not what it was")

    script = sh(f": {mark}; tee /v/half && touch /v/complete")
    for _ in range(3):
        with pytest.raises(Damaged):
            list(ENGINE.run_helper(bed.REDIS_IMAGE, script, volumes={volume: ("/v", "rw")}, stdin=broken()))
    there = ENGINE.run_helper(bed.REDIS_IMAGE, ["ls", "/v"], volumes={volume: ("/v", "ro")})
    assert b"".join(there) == b"half\n"
    assert helpers(mark) == []


def test_a_helper_makes_no_volume(docker_client: docker.DockerClient) -> None:
    """The engine would make a missing one, and back up its emptiness."""
    with pytest.raises(ContainerError, match="no such volume"):
        list(ENGINE.run_helper(bed.REDIS_IMAGE, ["true"], volumes={"backupd-nosuch": ("/v", "ro")}))
    with pytest.raises(docker.errors.NotFound):
        docker_client.volumes.get("backupd-nosuch")


# --- sandboxes ------------------------------------------------------------------------------------------

REDIS = ContainerSpec(
    bed.REDIS_IMAGE, env={"A": "b"}, volumes=("/data", "/more"), port=6379, ready=("redis-cli", "ping")
)


def test_a_sandbox_is_private_fresh_and_leaves_nothing(
    sandbox: DockerSandbox, docker_client: docker.DockerClient
) -> None:
    """Sources reach each other by their names; ports are on 127.0.0.1; all of it goes by its label."""
    sessions = sandbox.create("sessions", REDIS)
    other = sandbox.create("other", ContainerSpec(bed.REDIS_IMAGE, command=SLEEPER))
    assert not sessions.running
    sessions.start()
    other.start()
    sandbox.wait_ready(sessions, REDIS)
    sandbox.wait_ready(other, ContainerSpec(bed.REDIS_IMAGE))
    assert b"".join(other.exec(["redis-cli", "-h", "sessions", "ping"])) == b"PONG\n"
    assert b"".join(sessions.exec(["hostname"])) == b"sessions\n"
    assert sessions.env["A"] == "b"
    assert sessions.address(6379)[0] == "127.0.0.1"
    inspected = docker_client.containers.get(sessions.name)
    assert [end["HostIp"] for end in inspected.ports["6379/tcp"] or ()] == ["127.0.0.1"]
    assert inspected.labels["backupd.source"] == "sessions"
    assert sessions.mount("/data") != sessions.mount("/more")
    assert sandbox.name in DockerSandbox.names(ENGINE)
    found = DockerSandbox.find(ENGINE, sandbox.name)
    assert {source: made.name for source, made in found.containers().items()} == {
        "sessions": sessions.name,
        "other": other.name,
    }
    found.destroy()
    assert sandbox.name not in DockerSandbox.names(ENGINE)
    leftovers = {"label": f"backupd.sandbox={sandbox.name}"}
    assert docker_client.volumes.list(filters=leftovers) == []
    found.destroy()  # nothing left to do


def test_destroy_touches_only_what_carries_its_label(
    sandbox: DockerSandbox, services: bed.Services, docker_client: docker.DockerClient
) -> None:
    """Not a stranger with a name like it, not another sandbox, not a container somebody put on its network."""
    look_alike = services.container(bed.REDIS_IMAGE, SLEEPER, name=f"backupd-{sandbox.name}-mine")
    volume = services.volume(f"backupd-{sandbox.name}-x-0")
    longer = DockerSandbox(ENGINE, f"{sandbox.name}-2", labels=bed.labels())
    longer.create("a", ContainerSpec(bed.REDIS_IMAGE, command=SLEEPER))
    made = sandbox.create("a", ContainerSpec(bed.REDIS_IMAGE, command=SLEEPER))
    guest = services.container(bed.REDIS_IMAGE, SLEEPER, network=sandbox.network)
    with pytest.raises(ContainerError, match="network"):
        sandbox.destroy()
    assert not [c for c in ENGINE.containers() if c.name == made.name]
    docker_client.networks.get(sandbox.network).disconnect(guest.container)
    sandbox.destroy()
    assert ENGINE.container(look_alike.name).running
    assert ENGINE.container(guest.name).running
    assert docker_client.volumes.get(volume)
    assert list(longer.containers()) == ["a"]
    longer.destroy()


def test_a_name_that_is_taken_is_refused(sandbox: DockerSandbox) -> None:
    """Two restores must not meet in one sandbox."""
    sandbox.create("a", ContainerSpec(bed.REDIS_IMAGE, command=SLEEPER))
    with pytest.raises(ContainerError, match="there is a sandbox") as failure:
        DockerSandbox(ENGINE, sandbox.name).create("b", ContainerSpec(bed.REDIS_IMAGE))
    assert "another name" in failure.value.hint
    with pytest.raises(ContainerError, match="there is no sandbox"):
        DockerSandbox.find(ENGINE, "nosuch")
    with pytest.raises(ContainerError, match="cannot be the name"):
        DockerSandbox(ENGINE, "a/b")


def test_a_service_that_ends_is_told_at_once_with_its_last_lines(sandbox: DockerSandbox) -> None:
    """Nobody waits two minutes for a container that is gone."""
    spec = ContainerSpec(bed.REDIS_IMAGE, command=("redis-server", "--nosuch"), ready=("redis-cli", "ping"))
    made = sandbox.create("a", spec)
    made.start()
    started = time.monotonic()
    with pytest.raises(RestoreFailed, match=r"ended with status 1 before it was ready(?s:.*)nosuch"):
        sandbox.wait_ready(made, spec)
    assert time.monotonic() - started < 30


def test_a_service_that_never_gets_ready_is_given_up(sandbox: DockerSandbox) -> None:
    """With what its `ready` program said; one that hangs is no reason to wait for ever."""
    spec = ContainerSpec(bed.REDIS_IMAGE, command=SLEEPER, ready=("sh", "-c", "echo not yet >&2; exit 1"))
    made = sandbox.create("a", spec)
    made.start()
    with pytest.raises(RestoreFailed, match=r"not ready after 1 s: .*not yet"):
        sandbox.wait_ready(made, spec, timeout=1)


def test_a_service_that_gets_on_is_waited_for_and_one_that_stands_still_is_not(
    sandbox: DockerSandbox,
) -> None:
    """Well beyond the time that one has that does not move; and whoever waits may end it."""
    ready = ("sh", "-c", "echo not yet >&2; test -e /up")
    spec = ContainerSpec(bed.REDIS_IMAGE, command=SLEEPER, ready=ready)
    made = sandbox.create("a", spec)
    made.start()
    asked: list[float] = []

    def moving() -> str:
        asked.append(time.monotonic())
        if asked[-1] - asked[0] > 5:
            b"".join(made.exec(["touch", "/up"]))
        return f"{len(asked)} of many"

    sandbox.wait_ready(made, spec, timeout=2, moving=moving)
    assert asked[-1] - asked[0] > 5
    b"".join(made.exec(["rm", "/up"]))
    with pytest.raises(RestoreFailed, match=r"stood still for 2 s, 7 of 9: .*not yet"):
        sandbox.wait_ready(made, spec, timeout=2, moving=lambda: "7 of 9")

    def told_to_stop() -> str:
        raise Interrupted("stop")

    with pytest.raises(Interrupted):
        sandbox.wait_ready(made, spec, moving=told_to_stop)


def test_a_volume_needs_no_image_of_its_own(sandbox: DockerSandbox) -> None:
    """The container only holds the volume and is never started: any image does."""
    spec = ContainerSpec("nosuch.invalid/image:1", volumes=("/data",), service=False)
    made = sandbox.create("uploads", spec)
    assert not made.running
    place = made.mount("/data")
    assert place is not None
    assert list(place.iterdir()) == []


# --- images and engines ---------------------------------------------------------------------------------


def test_an_image_that_cannot_be_had_is_told_with_a_hint(sandbox: DockerSandbox) -> None:
    """In one line, and soon."""
    with pytest.raises(ContainerError, match="cannot pull the image") as failure:
        sandbox.create("a", ContainerSpec("127.0.0.1:1/nosuch:1"))
    assert "docker pull 127.0.0.1:1/nosuch:1" in failure.value.hint


def test_a_pull_that_falls_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """docker-py alone would wait for ever for a registry that says nothing more."""
    with socket.socket(socket.AF_UNIX) as listener:
        path = f"/tmp/backupd-test-{time.time_ns()}.sock"
        listener.bind(path)
        listener.listen()
        threading.Thread(target=_silent_engine, args=(listener,), daemon=True).start()
        monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
        monkeypatch.setattr("backupd.sandbox.engine.PULL_STALL", 0.5)
        try:
            with pytest.raises(ContainerError, match=r"fell silent|did not answer in time"):
                Engine().ensure_image("some:image", progress=Silence())
        finally:
            Path(path).unlink()


def _silent_engine(listener: socket.socket) -> None:
    """Answers like an engine, and begins a pull that never goes on."""
    while True:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            threading.Thread(target=_answer, args=(connection,), daemon=True).start()
            continue
        return


def _answer(connection: socket.socket) -> None:
    said = b""
    with contextlib.suppress(OSError):
        while data := connection.recv(65536):
            said += data
            if b"\r\n\r\n" not in said:
                continue
            if b"/version" in said:
                body = b'{"ApiVersion": "1.41", "Version": "x"}'
                head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                connection.sendall(head % len(body) + body)
            elif b"/images/create" in said:
                body = b'{"status": "Pulling"}\r\n'
                connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                connection.sendall(b"%x\r\n%s\r\n" % (len(body), body))
            else:
                body = b'{"message": "no such image"}'
                head = (
                    b"HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                )
                connection.sendall(head % len(body) + body)
            said = b""


def test_no_engine_is_told_with_a_hint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not found, refused, not allowed: one line each; nothing is connected to before it is needed."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nosuch.sock")
    engine = Engine()
    with pytest.raises(ContainerError, match="no container engine answers at unix://") as failure:
        engine.container("x")
    assert "DOCKER_HOST" in failure.value.hint
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    with pytest.raises(ContainerError, match="no container engine answers at tcp://"):
        Engine().ping()


def test_the_engine_tells_its_kernel() -> None:
    assert ENGINE.kernel >= (3, 10)  # Docker needs that much


# --- pure -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3 * BLOCK), max_size=5))
def test_a_body_goes_out_in_blocks(sizes: list[int]) -> None:
    """None is larger than one, none is empty, and together they are what was given."""
    chunks = [bytes([number]) * size for number, size in enumerate(sizes)]
    blocks = list(in_blocks(chunks))
    assert b"".join(blocks) == b"".join(chunks)
    assert all(0 < len(block) <= BLOCK for block in blocks)


@pytest.mark.parametrize(
    ("release", "version"),
    [
        ("6.1.0-28-amd64", (6, 1)),
        ("4.18.0-553.el8_10.x86_64", (4, 18)),
        ("5.15.167.4-microsoft-standard-WSL2", (5, 15)),
        ("", ()),
    ],
)
def test_a_release_has_a_version(release: str, version: tuple[int, ...]) -> None:
    assert kernel_of(release) == version


@given(
    st.lists(st.tuples(st.integers(0, 3), st.binary(max_size=300)), max_size=12),
    st.lists(st.integers(1, 50), min_size=1),
)
def test_frames_are_split_however_they_arrive(frames: list[tuple[int, bytes]], cuts: list[int]) -> None:
    """Pieces of any size give each stream back whole and in order."""
    wire = b"".join(bytes([kind, 0, 0, 0]) + len(body).to_bytes(4, "big") + body for kind, body in frames)
    splitter = Demultiplexer()
    got: dict[int, bytes] = {}
    at = turn = 0
    while at < len(wire):
        size = cuts[turn % len(cuts)]
        for kind, piece in splitter.feed(memoryview(wire)[at : at + size]):
            got[kind] = got.get(kind, b"") + piece
        at, turn = at + size, turn + 1
    wanted: dict[int, bytes] = {}
    for kind, body in frames:
        if body:
            wanted[kind] = wanted.get(kind, b"") + body
    assert got == wanted
    assert splitter.between_frames


def test_an_incomplete_frame_is_noticed() -> None:
    """A broken connection is not the end of a program; garbage is no stream."""
    splitter = Demultiplexer()
    list(splitter.feed(memoryview(b"\x01\0\0\0\0\0\0\x05hell")))
    assert not splitter.between_frames
    with pytest.raises(ContainerError, match="no stream frame"):
        list(Demultiplexer().feed(memoryview(b"OCI runtime exec failed")))


@given(st.integers(0, 4 * 10**18), st.sampled_from([0, 60, -330]))
def test_times_of_the_engine_keep_their_nanoseconds(nanoseconds: int, offset: int) -> None:
    """Go leaves out trailing zeros, and the fraction where it is zero."""
    from datetime import UTC, datetime, timedelta, timezone

    zone = timezone(timedelta(minutes=offset))
    whole = datetime.fromtimestamp(nanoseconds // 10**9, UTC).astimezone(zone)
    fraction = f"{nanoseconds % 10**9:09d}".rstrip("0")
    text = whole.strftime("%Y-%m-%dT%H:%M:%S") + (f".{fraction}" if fraction else "")
    text += "Z" if not offset else whole.strftime("%z")[:3] + ":" + whole.strftime("%z")[3:]
    assert _nanoseconds(text) == nanoseconds
