"""Programs of ours that run in processes of their own, where the interpreter's lock is not shared.

Such a program is a module's file. Its interpreter starts bare, in 20 ms, and reads no setting of the environment; what
it imports besides the standard library it finds by `import_path()`, which it is told.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import backupd

if TYPE_CHECKING:
    import subprocess


def start(program: str, descriptor: int, *, bufsize: int = -1) -> subprocess.Popen[bytes]:
    """`program`: the path of its file. It is asked by its standard input and answers by its standard output; it has
    the open `descriptor` besides. Raises OSError."""
    import subprocess  # 3 ms

    return subprocess.Popen(
        [sys.executable, "-I", "-S", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=(descriptor,),
        bufsize=bufsize,
        start_new_session=True,  # Ctrl-C is for the agent, which ends it, or lets it finish what it is at
    )


def import_path() -> list[str]:
    """Where modules are found here; our own too where they are installed to be edited and a hook finds them."""
    return [str(Path(backupd.__file__).parents[1]), *sys.path]
