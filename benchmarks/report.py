"""benchmarks/README.md from what the last `make bench` measured."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch
from pairs import OUT

PAGE = Path(__file__).parent / "README.md"
HEAD = """# Speed and memory

`make bench` measures this page anew. Ratios are medians of interleaved pairs in one process, in
processor time of one thread; both sides compute the same result, which is checked before timing.

| measured | figure | aim | met | more |
|---|---|---|---|---|
"""


def main() -> None:
    """One line per measurement, in the order of their names."""
    lines = [row(json.loads(path.read_text())) for path in sorted(OUT.glob("*.json"))]
    machine = f"\n{platform.machine()}, torch {torch.__version__}, one thread.\n"
    PAGE.write_text(HEAD + "\n".join(lines) + "\n" + machine, encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


def row(line: dict[str, object]) -> str:
    shown = {"what", "aim", "value", "met"}
    more = ", ".join(f"{k} {number(v)}" for k, v in line.items() if k not in shown)
    met = "yes" if line["met"] else "no"
    return f"| {line['what']} | {number(line['value'])} | {line['aim']} | {met} | {more} |"


def number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
