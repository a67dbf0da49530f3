"""An S3 server of this machine (SeaweedFS), and a slow line to it."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.containers import wait_for
from benchmarks.measure import ToolFailed

REGION = "us-east-1"


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """Where it answers, and what opens it."""

    address: str
    """HOST:PORT"""
    access_key: str
    secret_key: str

    def client(self, address: str = "") -> Any:
        """A boto3 client, through another address where one is given."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=f"http://{address or self.address}",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=REGION,
            config=Config(proxies={}, s3={"addressing_style": "path"}),
        )

    def size(self, bucket: str) -> int:
        """Bytes of all objects."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return sum(found["Size"] for page in pages for found in page.get("Contents", ()))


def program() -> str | None:
    """The server's, from this environment or the PATH."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


@contextmanager
def object_store(folder: Path) -> Iterator[ObjectStore]:
    """Runs with its data in `folder`, which is for the caller to remove."""
    weed = program()
    if weed is None:
        raise ToolFailed("there is no S3 server here: pip install -e '.[dev]'")
    data = folder / "data"
    data.mkdir(parents=True)
    store = ObjectStore("", "bench" + secrets.token_hex(8), secrets.token_hex(20))
    ports = free_ports(8)
    (folder / "master.toml").write_text("[master.volume_growth]\ncopy_1 = 1\n")
    argv = [
        weed, "mini", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-s3.port={ports[0]}", f"-s3.port.grpc={ports[1]}", "-s3.port.iceberg=0", "-s3.port.lance=0",
        f"-master.port={ports[2]}", f"-master.port.grpc={ports[3]}", "-master.telemetry=false",
        "-master.volumeSizeLimitMB=1024", "-volume.max=1000", "-volume.preStopSeconds=0",
        f"-volume.port={ports[4]}", f"-volume.port.grpc={ports[5]}",
        f"-filer.port={ports[6]}", f"-filer.port.grpc={ports[7]}", "-webdav=false", "-admin.ui=false",
    ]  # fmt: skip
    env = {
        "PATH": os.environ["PATH"], "HOME": str(folder), "TMPDIR": str(folder),
        "AWS_ACCESS_KEY_ID": store.access_key, "AWS_SECRET_ACCESS_KEY": store.secret_key,
    }  # fmt: skip
    store = ObjectStore(f"127.0.0.1:{ports[0]}", store.access_key, store.secret_key)
    with _process(argv, env, folder / "log"):
        wait_for(lambda: _works(store), "the S3 server")
        yield store


@contextmanager
def slow_line(store: ObjectStore, *, milliseconds: float, megabytes: float, log: Path) -> Iterator[str]:
    """HOST:PORT that leads to the store over a line of that delay and width."""
    argv = [sys.executable, "-m", "benchmarks.link", store.address, f"{milliseconds:g}", f"{megabytes:g}"]
    said = log.with_suffix(".port")
    root = str(Path(__file__).parent.parent)
    with _process(argv, {"PATH": os.environ["PATH"], "PYTHONPATH": root}, said):
        wait_for(lambda: said.read_text().strip(), "the line")
        yield f"127.0.0.1:{said.read_text().split()[0]}"


@contextmanager
def _process(argv: Sequence[str], env: dict[str, str], log: Path) -> Iterator[None]:
    with ExitStack() as stack:
        out = stack.enter_context(log.open("wb"))
        process = subprocess.Popen(
            argv, cwd=log.parent, env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _works(store: ObjectStore) -> bool:
    """A bucket can be made, filled and removed; the port opens earlier than that."""
    from botocore.exceptions import BotoCoreError, ClientError

    host, _, port = store.address.partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
        client = store.client()
        client.create_bucket(Bucket="ready")
        client.put_object(Bucket="ready", Key="ready", Body=b"1")
        client.delete_object(Bucket="ready", Key="ready")
        client.delete_bucket(Bucket="ready")
    except (OSError, BotoCoreError, ClientError):
        return False
    return True


def free_ports(count: int) -> list[int]:
    """Below those that the kernel hands out, which a connection could take before their use."""
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
