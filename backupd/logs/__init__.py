"""The continuous side of a source: its log, stored piece by piece, put together, read back (FORMAT.md, Log)."""

from backupd.logs import check
from backupd.logs.check import check_logs
from backupd.logs.claim import Claim
from backupd.logs.compact import Compaction, compact_logs, plan_compaction
from backupd.logs.read import (
    LOG_FOLDER,
    anchored,
    check_log,
    reached,
    read_logs,
    read_span,
    wait_for_logs,
    write_logs,
)
from backupd.logs.writer import LogWriter, Recorded, put_mark

__all__ = [
    "LOG_FOLDER",
    "Claim",
    "Compaction",
    "LogWriter",
    "Recorded",
    "anchored",
    "check",
    "check_log",
    "check_logs",
    "compact_logs",
    "plan_compaction",
    "put_mark",
    "reached",
    "read_logs",
    "read_span",
    "wait_for_logs",
    "write_logs",
]
