"""The options that every command takes, and the session they describe."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from backupd.agent import Agent
    from backupd.config import Config

F = TypeVar("F", bound=Callable[..., Any])


class Session:
    """One command line: where its configuration is, and how it wants to be answered."""

    def __init__(self) -> None:
        self.config_path: Path | None = None
        self.location: str = ""
        self.json = False
        self.quiet = False

    @cached_property
    def config(self) -> Config:
        """Loaded once. Raises UsageError."""
        from backupd.config import load

        return load(self.config_path, os.environ, location=self.location)

    @cached_property
    def agent(self) -> Agent:
        """Made once. What the parts have to say goes to standard error, without secrets."""
        import logging

        from backupd import log
        from backupd.agent import build

        if not logging.getLogger().handlers:  # `serve` has set its own
            debug = os.environ.get("BACKUPD_DEBUG") == "1"
            log.configure("plain", level="DEBUG" if debug else "WARNING")
        return build(self.config, env=dict(os.environ))


def _set(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def callback(ctx: click.Context, _parameter: click.Parameter, value: Any) -> None:
        session = ctx.ensure_object(Session)
        if value:
            setattr(session, name, value)

    return callback


def shared_options(command: F) -> F:
    """`--config`, `--repository`, `--json`, `--quiet`: before the command or after it, as one likes."""
    for option in (
        click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=_set("quiet"),
                     help="No progress; results and errors only."),
        click.option("--json", is_flag=True, expose_value=False, callback=_set("json"),
                     help="Results as one JSON document on standard output."),
        click.option("--repository", metavar="LOCATION", expose_value=False, callback=_set("location"),
                     help="Another repository than the configured one."),
        click.option("-c", "--config", metavar="FILE", type=click.Path(path_type=Path), expose_value=False,
                     callback=_set("config_path"),
                     help="Else $BACKUPD_CONFIG, ./backupd.toml, /etc/backupd/backupd.toml."),
    ):  # fmt: skip
        command = option(command)
    return command


def command(name: str, **settings: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """A click command with the shared options that is handed the Session first."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        helping = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
        handed: Callable[..., Any] = click.pass_obj(function)
        made: click.Command = click.command(name, click.Command, context_settings=helping, **settings)(
            shared_options(handed)
        )
        return made

    return decorate
