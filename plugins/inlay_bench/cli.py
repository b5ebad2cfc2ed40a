"""`inlay eval`: methods over a task, and a report. Torch is imported when it starts."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from inlay.cli import output
from inlay.cli.listing import Json
from inlay.cli.listing import show as show_rows
from inlay.cli.run import hush_loading_bars
from inlay_config.errors import ConfigError, PluginError


def evaluate(
    task: Annotated[
        str | None, typer.Argument(help="Name of a task, or a YAML file; listed if not given.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Over every experiment.", show_default=False),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            metavar="A,B@KEY=VALUE", help="Experiments by name or YAML file, or of them variants."
        ),
    ] = "copy",
    n: Annotated[
        int | None, typer.Option(help="Items; the task's own number if not given.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Where to write; outputs/eval/TASK if not given."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the items.")] = 0,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHERE|OPTION=VALUE",
            help="The benchmark's folder or hub name; options of its items.",
        ),
    ] = None,
    network: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=WHERE", help="What measures look through, instead of the task's."
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Method that others are compared to; the first if not given.")
    ] = None,
    retry: Annotated[str | None, typer.Option(metavar="failed", help="Do those again.")] = None,
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="Measure the pictures in --out again.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Set aside what is in --out; begin anew.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare methods on a task; write records, pictures and a report. Resumes where it stopped."""
    from inlay_bench import tasks

    if task is None:
        show_rows(tasks.listing(), ("summary", "items"), as_json)
        return
    try:
        from inlay_bench import report, runner
        from inlay_bench.methods import build, drawer, split
        from inlay_bench.terminal import Progress, show
    except ModuleNotFoundError as error:
        fix = "Install what it needs: pip install 'inlay[bench]'."
        raise PluginError(f"there is no {error.name} here", where="inlay eval", fix=fix) from error
    if retry not in (None, "failed"):
        raise ConfigError(f"'{retry}' cannot be done again", where="--retry", fix="Say failed.")
    if n is not None and n < 1:
        raise ConfigError(f"{n} items", where="--n", fix="It must be 1 or more.")
    loaded = tasks.load(task)
    tasks.adapt(loaded, data or (), network or ())
    folder = output.resolve(out) if out else runner.default_folder(loaded)
    words, asked = overrides or (), split(methods)
    made, draw = build(asked, loaded, words), drawer(loaded, words)
    if baseline is not None and baseline not in (names := [method.name for method in made]):
        fix = f"One of {', '.join(names)}."
        raise ConfigError(f"no method '{baseline}'", where="--baseline", fix=fix)
    again = {"retry_failed": retry == "failed", "remeasure": remeasure, "restart": restart}
    hush_loading_bars()
    try:
        with Progress(quiet=as_json) as progress:
            done = runner.evaluate(
                loaded, made, folder, n, seed, draw, **again, callback=progress.update
            )
    except KeyboardInterrupt:
        typer.echo(f"what is done stays in {folder}; the same command goes on from there", err=True)
        raise
    summary = report.summarise(done, baseline)
    paths = report.write(summary, folder)
    if as_json:
        typer.echo(json.dumps(report.as_data(summary)))
    else:
        show(summary)
        typer.echo("\n".join(str(path) for path in paths.values()))
