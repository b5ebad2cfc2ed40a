"""The command ``inlay-toybox``: draw scenes, train the models, measure them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from inlay_toybox.recipes import RECIPES, accepted


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "inlay-toybox", description="The toybox: a miniature world and its models."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    render = verbs.add_parser("render", help="draw a scene, or several on a sheet")
    render.add_argument("--n", type=int, default=40, help="number of scenes")
    render.add_argument("--seed", type=int, default=0, help="seed of the first scene")
    render.add_argument("--size", type=int, default=64, help="side of a picture in pixels")
    render.add_argument("--out", type=Path, default=Path("sheet.png"))
    render.add_argument("--captions", action="store_true", help="print the captions as well")
    train = verbs.add_parser("train", help="train a model, or train it further")
    train.add_argument("name", choices=list(RECIPES))
    train.add_argument(
        "--minutes", type=float, default=60.0, help="wall-clock budget of the whole schedule"
    )
    train.add_argument("--device", default="auto", help="auto, cpu, cuda")
    train.add_argument("--out", type=Path, default=None, help="default: outputs/toybox/NAME")
    train.add_argument("--size", type=int, default=None, help="default: 64, on an accelerator 128")
    train.add_argument("--vae", type=Path, default=None, help="default: the shipped one")
    train.add_argument(
        "--resume", action="store_true", help="go on from --out, or else from the shipped weights"
    )
    ship = verbs.add_parser("ship", help="write a tuned model as what it has beyond another")
    ship.add_argument("tuned", type=Path, help="folder that `inlay train` wrote to")
    ship.add_argument("out", type=Path, help="its folder below models/")
    ship.add_argument("--base", default="sd", help="name of the model that it was tuned from")
    ship.add_argument(
        "--rank", type=int, default=24, help="of what is kept of a weight; 0: files that differ"
    )
    ship.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="FILE=FILE",
        help="weights, and those of the base, or of another model (../NAME/…), that they come from",
    )
    quality = verbs.add_parser("quality", help="measure the shipped models")
    report = verbs.add_parser("report", help="write figures, grids and curves into the page")
    report.add_argument("--page", type=Path, default=Path("docs/toybox.md"))
    for verb in (quality, report):
        verb.add_argument("--n", type=int, default=200, help="number of unseen prompts and scenes")
        verb.add_argument("models", nargs="*", help="default: all of them")
    return parser


def _render(args: argparse.Namespace) -> None:
    from PIL import Image

    from inlay_toybox import world

    scenes = [world.sample(args.seed + i, held_out=True) for i in range(args.n)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.n == 1:
        Image.fromarray(world.render(scenes[0], args.size).image).save(args.out)
    else:
        world.sheet(scenes, args.size).save(args.out)
    if args.captions:
        print("\n".join(scene.caption for scene in scenes))
    print(args.out)


def _train(args: argparse.Namespace) -> None:
    from inlay_toybox import path, training

    out = args.out or Path("outputs/toybox") / args.name
    device = training.pick_device(args.device)
    accelerated = device.type == "cuda"
    recipe = RECIPES[args.name]
    train = recipe.load()
    offered = {
        "size": args.size or (128 if accelerated else 64),
        "start": recipe.model if args.resume and recipe.model.is_dir() else None,
        "resume": args.resume,
        "vae": args.vae or path("flux") / "vae",
        "compiled": args.minutes > 20,
    }
    if accelerated:
        offered["batch_size"] = 256
    print(train(args.minutes, out, device, **accepted(train, offered)))


def _ship(args: argparse.Namespace) -> None:
    from inlay_toybox import deltas, path, training

    sources = dict(pair.split("=", 1) for pair in args.source)
    base = path(args.base)
    deltas.write(args.tuned / "model", base, args.out, args.rank, sources, called=args.base)
    training.export_log(args.tuned, args.out)
    print(args.out)


def _quality(args: argparse.Namespace) -> None:
    from inlay_toybox.quality.figures import figures, shipped

    for name in shipped(args.models):
        print(name)
        for figure in figures(name, args.n):
            aim = f"  (aim {figure.aim})" if figure.aim else ""
            print(f"  {figure.label}: {figure.value}{aim}", flush=True)


def _report(args: argparse.Namespace) -> None:
    from inlay_toybox import report

    for file in report.write(args.page, args.models, args.n):
        print(file)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code (2 for a mistake in the arguments)."""
    args = _parser().parse_args(argv)
    try:
        {
            "render": _render,
            "train": _train,
            "ship": _ship,
            "quality": _quality,
            "report": _report,
        }[args.verb](args)
    except (OSError, ValueError) as error:
        print(f"inlay-toybox {args.verb}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(
            f"inlay-toybox {args.verb}: needs the package {error.name!r}, which comes with "
            "inlay[segment]",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
