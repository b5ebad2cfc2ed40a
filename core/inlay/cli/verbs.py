"""Verbs of other packages: entry points of the group `inlay.verbs`, each a function for typer or a
`typer.Typer`. A verb's module is imported when help lists it or when it runs, so keep it light.
"""

from __future__ import annotations

from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from inlay_config.errors import PluginError


class Verbs(TyperGroup):
    """Our own verbs, then the installed ones; nobody can take a name of ours."""

    @cached_property
    def installed(self) -> dict[str, EntryPoint]:
        points = sorted(entry_points(group="inlay.verbs"))
        return {point.name: point for point in points if point.name not in self.commands}

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *self.installed]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        point = self.installed.get(cmd_name)
        return _load(point) if point else super().get_command(ctx, cmd_name)


def _load(point: EntryPoint) -> Any:
    """The verb's command; in place of one that cannot be imported, a command that says so."""
    try:
        verb = point.load()
    except Exception as error:  # another package's module may raise anything
        verb = _broken(point, error)
    app = verb
    if not isinstance(verb, typer.Typer):
        app = typer.Typer(add_completion=False)
        app.command(context_settings={"help_option_names": ["-h", "--help"]})(verb)
    command = get_command(app)
    command.name = point.name
    return command


def _broken(point: EntryPoint, error: Exception) -> typer.Typer:
    owner = point.dist.name if point.dist else "its package"
    app = typer.Typer(add_completion=False)
    lenient = {"ignore_unknown_options": True, "allow_extra_args": True}

    @app.command(help=f"(cannot be loaded; reinstall {owner})", context_settings=lenient)
    def broken() -> None:
        problem = f"cannot be imported: {type(error).__name__}: {error}"
        fix = f"Reinstall {owner}, or remove it."
        raise PluginError(problem, where=f"verb {point.name} ({point.value})", fix=fix) from error

    return app
