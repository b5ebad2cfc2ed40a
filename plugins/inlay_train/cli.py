"""`inlay train` and `inlay pairs`. Torch is imported when they start."""

from __future__ import annotations

from typing import Annotated

import typer

from inlay.cli import output
from inlay.cli.run import hush_loading_bars


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="Name of a recipe, or a YAML file; listed if not given.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Over the recipe.", show_default=False),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Where to write; outputs/train/RECIPE if not given."),
    ] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="In place of train.steps.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint.")] = False,
) -> None:
    """Train a model. Several GPUs: accelerate launch -m inlay_train RECIPE ..."""
    from inlay_train import recipes

    if recipe is None:
        typer.echo("\n".join(recipes.listing()))
        return
    cls, cfg = recipes.load(recipe, overrides or ())
    folder = output.resolve(out or f"outputs/train/{recipe}")
    output.check(folder)
    hush_loading_bars()
    from inlay_train.trainer import train as run

    built = cls(cfg)
    typer.echo(str(run(built, folder, max_steps, resume, lambda line: typer.echo(line, err=True))))


def pairs(
    triplets: Annotated[
        str, typer.Argument(help="toybox, or a file of JSON lines with input, edit, output.")
    ] = "toybox",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Over the experiment.")
    ] = None,
    experiment: Annotated[
        str, typer.Option(help="A name or YAML file with prompt_to_prompt.")
    ] = "instruction_pairs",
    out: Annotated[str, typer.Option(metavar="DIR", help="Where to write.")] = "outputs/pairs",
    n: Annotated[int, typer.Option(min=1, help="Triplets.")] = 100,
    samples: Annotated[int, typer.Option(min=2, help="Pairs drawn for each.")] = 8,
    keep: Annotated[int, typer.Option(min=1, help="Pairs kept of each, at most.")] = 4,
    clip: Annotated[str, typer.Option(help="What filters: a CLIPModel.")] = "toybox/clip",
    least: Annotated[
        str | None,
        typer.Option(metavar="IMAGE,CAPTION,DIRECTION", help="Similarities; else by model."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of triplets and noise.")] = 0,
) -> None:
    """Make pairs for instruction models by Prompt-to-Prompt, filtered by CLIP. Resumes."""
    from inlay_config import config
    from inlay_plugins import clips
    from inlay_train import prompt_pairs

    bounds = prompt_pairs.bounds(least) if least else None
    making = prompt_pairs.Making(samples, keep, least=bounds)
    hush_loading_bars()
    exp = config.load(experiment, overrides or ())
    maker = prompt_pairs.Maker(exp, clips.load(clip), making)
    folder = output.resolve(out)
    counts = prompt_pairs.make(
        triplets, folder, n, maker, seed, lambda line: typer.echo(line, err=True)
    )
    typer.echo(f"{folder}: {counts}")
