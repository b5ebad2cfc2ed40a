"""`make docs`: write the parts of the pages that come from the code, between their markers.

A test fails when a page is not what this would write.
"""

from __future__ import annotations

import json
import re
import sys
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from inlay_attention import conflicts

DOCS = Path(__file__).parent
sys.path.append(str(DOCS.parent / "tests"))  # what the tests measure is what the pages say
CELLS = {"composes": "·", "refused": "**×**", "refused unless one plugin": "one plugin",
         "refused unless equal": "if equal"}  # fmt: skip


def conflict_table() -> str:
    """The table of study D.7 with what the code decides, and the reasons below it."""
    kinds, reasons = conflicts.KINDS, dict[str, str]()
    lines = ["| | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for row, a in enumerate(kinds):
        cells = [""] * row
        for b in kinds[row:]:
            verdict, _, reason = conflicts.verdict(a, b).partition(": ")
            cells.append(CELLS[verdict])
            if reason:
                reasons.setdefault(reason, f"{a} and {b}" if a != b else f"two of {a}")
        lines.append(f"| {a} | " + " | ".join(cells) + " |")
    listed = [f"* {reason} (such as {pair})" for reason, pair in reasons.items()]
    key = "`·` composes, **×** is refused, *one plugin* or *if equal* says when it is not. Why:"
    return "\n".join([*lines, "", key, "", *listed])


@cache
def pair_verdicts() -> dict[tuple[str, str], dict[str, list[str]]]:
    """What the plan of every pair of first-party plugins says -> the models it says so for."""
    import compositions
    from inlay import backbones
    from inlay_config import registry

    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for model in compositions.MODELS:
        pipe = backbones.skeleton(registry.resolve_model(model))
        for pair in compositions.PAIRS:
            said = compositions.verdict(pipe, model, *pair)
            found.setdefault(pair, {}).setdefault(said, []).append(model)
    return found


def pair_matrix() -> str:
    """A row and a column per plugin; refusals are numbered as `refusals` lists them."""
    import compositions

    names, number = compositions.PLUGINS, count(1)
    cells = {}
    for pair, verdicts in pair_verdicts().items():
        cell = [PAIR_CELLS[said] for said in verdicts if said in PAIR_CELLS]
        if refused := [str(next(number)) for said in verdicts if said not in PAIR_CELLS]:
            cell.append("**×** " + ", ".join(refused))
        cells[pair] = " ".join(cell)
    lines = ["| | | " + " | ".join(map(str, range(2, len(names) + 1))) + " |",
             "|---|---" + "|:---:" * (len(names) - 1) + "|"]  # fmt: skip
    for i, row in enumerate(names):
        shown = [cells[row, column] for column in names[i + 1 :]]
        lines.append(f"| {i + 1} | `{row}` | " + " | ".join([""] * i + shown) + " |")
    return "\n".join(lines)


def refusals() -> str:
    """The messages, in the order of their numbers in the matrix."""
    said = [(pair, message, models) for pair, verdicts in pair_verdicts().items()
            for message, models in verdicts.items() if message not in PAIR_CELLS]  # fmt: skip
    return "\n".join(
        f"{i}. `{a}`, `{b}` on {' and '.join(f'`{model}`' for model in models)}: {message}"
        for i, ((a, b), message, models) in enumerate(said, 1)
    )


def options_beside() -> str:
    """Options of a plugin that leave room for another."""
    import compositions

    return "\n".join(
        f"* `{name}: {json.dumps(options)}` beside `{other}`"
        for name, case in compositions.CASES.items()
        for other, options in case.beside.items()
    )


def invariants() -> str:
    """What stays true of each plugin in every pair."""
    import compositions

    lines = ["| plugin | run with | always |", "|---|---|---|"]
    cases = {name: compositions.CASES.get(name) for name in compositions.SHIPPED}
    for name, case in ((name, case) for name, case in cases.items() if case):
        companions = ", ".join(f"`{other}`" for other in case.companions) or case.model
        lines.append(f"| `{name}` | {companions} | {case.says} |")
    return "\n".join(lines)


def together() -> str:
    """Experiments of several methods, as they ship, each with its picture."""
    from inlay_config.config import data_path

    lines: list[str] = []
    for name, (picture, shows) in TOGETHER.items():
        text = (data_path("experiments") / f"{name}.yaml").read_text(encoding="utf-8")
        lines += [f"`inlay run {name}`", "", "```yaml", text.strip(), "```", ""]
        lines += [f"![{shows}](pictures/together/{picture}.webp)", ""]
    return "\n".join(lines).strip()


TOGETHER = {
    "clip_guided_addit": ("guided_addit", "a view of the grass, and a dog on it by Add-it alone, "
                          "in the mask that it finds, and with CLIP guidance"),
    "p2p_blending": ("words_in_a_box", "a red car and a tree; a blue car by Prompt-to-Prompt, by "
                     "blending, and by both: only then layout and tree are the source's"),
}  # fmt: skip
PAIR_CELLS = {"composes": "·", "needs": "needs"}


@cache
def backbone_cases() -> tuple[Any, ...]:
    """The tiny models of the zoo, with what the probe says of each."""
    import backbone_checks
    import backbone_zoo

    return tuple(backbone_checks.Case(family) for family in backbone_zoo.FAMILIES)


def backbone_matrix() -> str:
    """A row per family: its sites by kind, what the keys of a joint site hold in order, who drives
    it, and a tick per check that holds."""
    import backbone_checks
    from inlay.backbones import adapt

    checks = backbone_checks.CHECKS
    head = "family | denoiser | called by | kinds of site | keys of a joint site | driven by"
    lines = [f"| {head} | " + " | ".join(checks) + " |"]
    lines.append("|---" * (head.count("|") + 1) + "|:---:" * len(checks) + "|")
    for case in backbone_cases():
        family, kinds = case.family, [spans.kind for spans in case.sites.values()]
        sites = ", ".join(dict.fromkeys(kinds))
        if case.without_softmax:
            sites += f"; no softmax in {', '.join(sorted(set(case.without_softmax.values())))}"
        order = ", ".join(name.split()[0] for name in family.joint)
        driver = f"`Session` ({adapt(family.adapter()).name})" if family.adapter else "guest mode"
        cells = [family.name, f"`{type(case.model).__name__}`", f"`{family.pipeline}Pipeline`"]
        passed = ["✓" if check(case) else "**fails**" for check in checks.values()]
        lines.append("| " + " | ".join([*cells, sites, order, driver, *passed]) + " |")
    return "\n".join(lines)


def backbone_checks_said() -> str:
    """What each tick stands for, in the check's own words."""
    import backbone_checks

    checks = backbone_checks.CHECKS.items()
    return "\n".join(f"* *{name}*: {' '.join(str(f.__doc__).split())}" for name, f in checks)


def backbones_refused() -> str:
    """Families whose tokens cannot be told apart, with the message."""
    import backbone_zoo
    from inlay import ModelError
    from inlay.backbones import token_spans

    lines = []
    for family in backbone_zoo.REFUSED:
        model, call = family.build()
        try:
            token_spans.probe(model, (), call)
        except ModelError as error:
            lines.append(f"* {family.name}, `{type(model).__name__}`: {error}")
    return "\n".join(lines)


PARTS = {
    "attention.md": {"conflicts": conflict_table},
    "compose.md": {"matrix": pair_matrix, "refusals": refusals, "beside": options_beside,
                   "invariants": invariants, "together": together},
    "backbones.md": {"families": backbone_matrix, "checks": backbone_checks_said,
                     "refused": backbones_refused},
}  # fmt: skip


def written(page: Path) -> str:
    """The page with its parts made anew."""
    text = page.read_text(encoding="utf-8")
    for name, make in PARTS[page.name].items():
        block = f"<!-- {name} -->\n{make()}\n<!-- /{name} -->"
        text = re.sub(
            rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, text, flags=re.S
        )
    return text


if __name__ == "__main__":
    for name in PARTS:
        (DOCS / name).write_text(written(DOCS / name), encoding="utf-8")
