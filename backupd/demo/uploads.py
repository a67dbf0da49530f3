"""The data directory in the demo: what is written, what is changed, how all of it is measured.

Shell and find, in the directory itself: the same where it is a volume in an engine and where it is a plain
directory, and nothing of what the backup uses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from backupd.demo.picture import Picture, digest

Shell: TypeAlias = Callable[[str], bytes]
"""A script, run by sh in the directory -> what it prints; raises when it ends badly."""

FILL = r"""
set -eu
i=0
while [ $i -lt 40 ]; do
  mkdir -p "docs/team-$i/empty"
  j=0
  while [ $j -lt 15 ]; do
    echo "document $i-$j: $i $j $((i * j))" >"docs/team-$i/report-$j.txt"
    j=$((j + 1))
  done
  i=$((i + 1))
done
head -c 12000000 /dev/urandom >scan.tiff
yes 'the same line over and over' | head -c 3000000 >log.txt
truncate -s 30000000 sparse.img && printf 'end' >>sparse.img
ln docs/team-1/report-1.txt hard-link
ln -s docs/team-2 symbolic-link
ln -s /nowhere/at/all dangling
mkfifo pipe
touch -d '1999-12-31 23:59:59.123456789 UTC' docs/team-3/report-3.txt
chmod 0750 docs/team-4 && chmod 4711 docs/team-5/report-5.txt
[ "$(id -u)" != 0 ] || chown -R 1234:5678 docs/team-6
printf 'odd' >"$(printf 'na\351ve \377 name')"
printf 'new\nline' >'name with
newline'
"""

CHANGE = r"""
set -eu
rm -r docs/team-7 docs/team-8 hard-link
echo 'overwritten' >docs/team-2/report-1.txt
echo 'one more line' >>log.txt
printf 'XX' | dd of=scan.tiff bs=1 seek=5000000 conv=notrunc 2>/dev/null
mv docs/team-9 docs/team-renamed
chmod 0700 docs/team-4
mkdir new && echo 'late' >new/late.txt
"""

LOOK = r"""
set -eu
find . -printf '%P|%y|%m|%U:%G|%n|%T@|%l|' \( -type f -printf '%s' -o -true \) -printf '\0'
printf '\0'
find . -type f -exec sha256sum -z {} +
"""


def fill(shell: Shell) -> None:
    """Some 700 files with what a tree can hold: links, holes, a FIFO, odd names, owners, nanoseconds."""
    shell(FILL)


def change(shell: Shell) -> None:
    """Files changed, renamed, removed and added."""
    shell(CHANGE)


def look(shell: Shell) -> Picture:
    """Every entry: type, mode, owner, links, time to the nanosecond, target, size and the content's digest."""
    entries, _, sums = shell(LOOK).decode("utf-8", "surrogateescape").partition("\0\0")
    contents: dict[str, str] = {}
    for line in sums.split("\0"):
        checksum, _, name = line.partition("  ")
        contents[name] = checksum
    things = {}
    for entry in entries.split("\0"):
        name, _, about = entry.partition("|")
        things[name or "."] = digest(about, contents.get(f"./{name}", ""))
    files = sum(1 for name in things if f"./{name}" in contents)
    return Picture(f"{len(things):,} entries, {files:,} files", things)
