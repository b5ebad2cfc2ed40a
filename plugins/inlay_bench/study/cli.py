"""`inlay study`, `inlay study-score`: a page for blind votes, and what the votes say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from inlay.cli import output
from inlay.cli.listing import Json
from inlay_config.errors import ConfigError, InputError


def study(
    results: Annotated[
        list[str], typer.Argument(help="Folders of `inlay eval`, or of pictures with equal names.")
    ],
    out: Annotated[str, typer.Option(metavar="FILE.html", help="The page.")] = "study.html",
    design: Annotated[str, typer.Option(metavar="2afc|rank|likert", help="How to vote.")] = "2afc",
    n: Annotated[
        int | None, typer.Option(help="Items, drawn by the seed; all if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of items, order and sides.")] = 0,
    methods: Annotated[
        str, typer.Option(metavar="A,B", help="Of the folders; all but copy, vae.")
    ] = "",
    against: Annotated[
        str | None, typer.Option(metavar="METHOD", help="2AFC: pairs with this one alone.")
    ] = None,
    ties: Annotated[bool, typer.Option("--ties", help="2AFC: offer 'no difference'.")] = False,
    question: Annotated[str | None, typer.Option(help="Instead of the design's own.")] = None,
    inputs: Annotated[
        str | None, typer.Option("--input", metavar="DIR", help="Pictures before the edit.")
    ] = None,
    captions: Annotated[
        str | None, typer.Option(metavar="JSON", help="Item to what was asked for.")
    ] = None,
    side: Annotated[int, typer.Option(help="Pixels of a picture, at most.")] = 768,
) -> None:
    """Make one HTML page for blind votes, and the key that says whose pictures they are."""
    from inlay_bench.records import on_disk
    from inlay_bench.study import design as designs
    from inlay_bench.study import page
    from inlay_bench.study.material import gather
    from inlay_config.images import whole

    for name, value in (("--n", n), ("--side", side)):
        if value is not None and value < 1:
            raise ConfigError(f"{value}", where=name, fix="It must be 1 or more.")
    path = output.resolve(out)
    if path.suffix not in (".html", ".htm"):
        raise ConfigError(f"'{out}' is no page", where="--out", fix="Give it the ending .html.")
    chosen = [name for name in methods.split(",") if name]
    folders = [Path(name) for name in results]
    before, said = (Path(name) if name else None for name in (inputs, captions))
    material = gather(folders, chosen, before, said)
    made = designs.build(material, design, seed, n, against, ties, question, side)
    key = path.with_suffix(".key.json")
    for file, text in ((key, json.dumps(made.key, indent=1) + "\n"), (path, page.html(made))):
        with on_disk(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            with whole(file) as partial:
                partial.write_text(text, encoding="utf-8")
    typer.echo(f"{len(made.page['questions'])} questions on {', '.join(material.methods)}")
    if material.left_out:
        typer.echo(
            f"{len(material.left_out)} items are left out: not every method has them", err=True
        )
    size = path.stat().st_size / 1e6
    typer.echo(f"{path} ({size:.1f} MB)\n{key} (keep it from voters)")


def score(
    votes: Annotated[list[str], typer.Argument(help="Files that voters saved.")],
    key: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The page's key; else the one beside the votes."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what votes prefer, pair by pair, with 95 % intervals, and how far voters agree."""
    from inlay_bench.study import score as scores
    from inlay_bench.study import table

    paths = [Path(name) for name in votes]
    result = scores.score(*scores.read(paths, Path(key) if key else _key_beside(paths[0])))
    if as_json:
        typer.echo(json.dumps(scores.as_data(result), indent=1))
    else:
        table.show(result)


def _key_beside(votes: Path) -> Path:
    found = sorted(votes.resolve().parent.glob("*.key.json"))
    if len(found) != 1:
        problem = f"{len(found)} keys lie beside the votes"
        raise InputError(problem, where=str(votes), fix="Name one with --key.")
    return found[0]
