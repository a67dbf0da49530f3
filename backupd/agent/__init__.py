"""Builds everything from a Config and runs until stopped: the only place that constructs."""

from backupd.agent.agent import Agent, Outcome, build, utc_now
from backupd.agent.findings import Finding
from backupd.agent.names import expand

__all__ = ["Agent", "Finding", "Outcome", "build", "expand", "utc_now"]
