"""`make docs`: write the parts of the pages that come from the code, between their markers.

A test fails when a page is not what this would write.
"""

from __future__ import annotations

import re
from pathlib import Path

from inlay import conflicts

DOCS = Path(__file__).parent
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


PARTS = {"attention.md": {"conflicts": conflict_table}}


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
