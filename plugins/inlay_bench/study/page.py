"""The page of a study: one HTML file that holds everything it needs and may reach nothing else."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from inlay_bench.study.design import SMALL, Study

HERE = Path(__file__).parent
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
KEYS = {
    "2afc": "<kbd>1</kbd> or <kbd>←</kbd> for the left picture, <kbd>2</kbd> or <kbd>→</kbd> for "
    "the right one.",
    "rank": "the number of the best picture first, then of the next.",
    "likert": "<kbd>1</kbd> for bad to <kbd>5</kbd> for excellent.",
}
TIES = " <kbd>0</kbd> for no difference."


def html(study: Study) -> str:
    """The page, complete in itself; the same study gives the same bytes."""
    page = study.page
    script = (HERE / "ballot.js").read_text("utf-8") + (HERE / "view.js").read_text("utf-8")
    return Template((HERE / "page.html").read_text("utf-8")).substitute(
        policy=POLICY,
        style=(HERE / "style.css").read_text("utf-8"),
        question=escape(page["question"]),
        total=len(page["questions"]),
        keys=KEYS[page["design"]] + (TIES if page["ties"] else ""),
        study=_json({**page, "small": SMALL}),
        pictures=_json(study.pictures),
        script=script,
    )


def _json(value: Any) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")
