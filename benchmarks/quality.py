"""`make quality`: how good the toybox's models and the methods are, over scenes nobody trained on.

Each section prints a table and writes it into docs/results.md between the markers of its name. The
models' figures are kept in outputs/toybox by their weights, pictures and records of the methods in
outputs/quality: what was measured once is not measured again.
`quality.py --n 200 --items 500 --only toybox-affordance ablations`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import ablations
import blending
import comparison
import exemplar_ablations
import exemplars
import hard_cases
import insertion
import instructions
import localisers
import synthetic_data

from inlay.cli.run import hush_loading_bars
from inlay_bench import report
from inlay_toybox.quality import figures

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"


def models(args: argparse.Namespace) -> str:
    """Every figure of every shipped model beside its aim."""
    rows = [
        (f"toybox/{name}" if i == 0 else "", figure.label, figure.value, figure.aim)
        for name in figures.shipped()
        for i, figure in enumerate(figures.figures(name, args.n, ROOT / figures.KEPT))
    ]
    return "\n".join(report.table(("model", "measured", "value", "aim"), rows))


Section = Callable[[argparse.Namespace], str]
"""(n: scenes of a model's figure, items, scenes: of insertion tasks) -> the section's text"""

SECTIONS: dict[str, Section] = {
    "models": models,
    "toybox-affordance": insertion.affordance,
    "variants": insertion.variants,
    "ablations": ablations.section,
    "hard-cases": hard_cases.section,
    "localisers": localisers.section,
    "toybox-additing": insertion.additing,
    "blending": blending.section,
    "synthetic-data": synthetic_data.section,
    "exemplars": exemplars.filling,
    "imitation": exemplars.imitating,
    "exemplar-guidance": exemplars.guidance,
    "instructions": instructions.insertion,
    "exemplar-ablations": exemplar_ablations.section,
    "tradeoff": instructions.tradeoff,
}


def main() -> None:
    """Measure what is not measured yet, then report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=200, help="scenes of each figure of a model")
    parser.add_argument("--items", type=int, default=500, help="of the insertion task's main rows")
    parser.add_argument("--scenes", type=int, default=50, help="of tables of four seeds a scene")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    args = parser.parse_args()
    hush_loading_bars()
    for name in args.only:
        show(name, SECTIONS[name](args))
    print(f"\nwritten to {PAGE.relative_to(ROOT)}; pictures in {comparison.OUT.relative_to(ROOT)}")


def show(name: str, text: str) -> None:
    """Print a section and put it between `<!-- name -->` and `<!-- /name -->` of the page.

    Raises ValueError where the page has no such markers.
    """
    print(f"\n{text}")
    page = PAGE.read_text(encoding="utf-8")
    marks = rf"<!-- {name} -->.*?<!-- /{name} -->"
    if not re.search(marks, page, re.S):
        raise ValueError(f"{PAGE.name} has no place <!-- {name} --> … <!-- /{name} -->")
    block = f"<!-- {name} -->\n{text}\n<!-- /{name} -->"
    PAGE.write_text(re.sub(marks, lambda _: block, page, flags=re.S), encoding="utf-8")


if __name__ == "__main__":
    main()
