"""Preferences from files of votes, with intervals.

Items are resampled, not votes: what several voters say of one item is not independent.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from inlay_bench import intervals
from inlay_bench.intervals import Interval
from inlay_bench.study.agreement import Agreement, agreement
from inlay_bench.study.design import FORMAT, POINTS
from inlay_config.errors import InputError

Z = 1.959964  # of a two-sided 95 % interval


@dataclass(frozen=True)
class Vote:
    """One answer with methods in place of pictures.

    methods: as shown. answer: 2AFC, the method, or None for no difference; rank, the methods, the
    best first; likert, 1..5.
    """

    voter: str
    item: str
    methods: tuple[str, ...]
    answer: Any


@dataclass(frozen=True)
class Pair:
    """Two methods: how often `a` is preferred to `b`, 0..1, ties half; of a rating, how much higher
    `a` is rated. `low`, `high` resample items. wilson: of the share, each vote taken as a draw of
    its own; None for a rating."""

    a: str
    b: str
    wins: int
    losses: int
    ties: int
    estimate: Interval
    wilson: tuple[float, float] | None


@dataclass(frozen=True)
class Row:
    """A method: share of its comparisons won (2AFC), mean rank (1 = best) or mean rating."""

    method: str
    value: Interval


@dataclass(frozen=True)
class Score:
    """A study's outcome. unanswered: questions that voters left open, all voters together."""

    design: str
    study: str
    voters: list[str]
    votes: int
    unanswered: int
    rows: list[Row]
    pairs: list[Pair]
    agreement: Agreement | None


def read(paths: Sequence[Path], key_path: Path) -> tuple[dict[str, Any], list[Vote]]:
    """The key, and all votes. Raises InputError for what is no key, no votes, votes on another
    page, an answer that was not offered, a question or a voter that comes twice."""
    key = _load(key_path)
    if key.get("inlay_study_key") != FORMAT:
        fix = "It is the file beside the page, PAGE.key.json."
        raise InputError("is no key of a study", where=str(key_path), fix=fix)
    votes: list[Vote] = []
    seen: dict[str, Path] = {}
    for path in paths:
        file = _load(path)
        if file.get("inlay_votes") != 1 or not isinstance(file.get("votes"), list):
            raise InputError("is no file of votes", where=str(path))
        if file.get("study") != key["study"]:
            problem = f"these are votes on another page ({file.get('study')}, not {key['study']})"
            raise InputError(problem, where=str(path), fix="Give the key of that page.")
        voter = str(file.get("voter"))
        if voter in seen:
            fix = "Give the later of the two."
            problem = f"the same voter as in {seen[voter].name}"
            raise InputError(problem, where=str(path), fix=fix)
        seen[voter] = path
        _once(file["votes"], path)
        votes += [_vote(voter, vote, key, path) for vote in file["votes"]]
    if not votes:
        raise InputError("there are no votes", where=", ".join(map(str, paths)))
    return key, votes


def score(key: Mapping[str, Any], votes: Sequence[Vote]) -> Score:
    """Rows and pairs in the key's order of methods."""
    methods = [m for m in key["methods"] if any(m in vote.methods for vote in votes)]
    items = sorted({vote.item for vote in votes})
    drawn = intervals.draws(len(items))
    design = key["design"]
    voters = list(dict.fromkeys(vote.voter for vote in votes))

    def over_items(values: Sequence[tuple[str, float]]) -> Interval:
        """Mean over items of each item's mean over votes."""
        by_item: dict[str, list[float]] = {item: [] for item in items}
        for item, value in values:
            by_item[item].append(value)
        means = [np.mean(v) if v else math.nan for v in by_item.values()]
        return intervals.interval(np.array(means, np.float64), drawn)

    if design == "likert":
        rated = {
            m: [(v.item, float(v.answer)) for v in votes if v.methods == (m,)] for m in methods
        }
        rows = [Row(m, over_items(rated[m])) for m in methods]
        both = (_rated(a, b, votes, over_items) for a, b in combinations(methods, 2))
        pairs = [pair for pair in both if pair.estimate.n]
        units: dict[tuple[str, str], dict[str, float]] = {}
        for v in votes:
            units.setdefault((v.item, v.methods[0]), {})[v.voter] = float(v.answer)
        agreed = agreement(units.values(), scale=POINTS - 1)
    else:
        compared = [each for vote in votes for each in comparisons(vote)]
        won = {m: [(v.item, _share(m, v)) for v in votes if m in v.methods] for m in methods}
        rows = [Row(m, over_items(won[m])) for m in methods]
        pairs = []
        for a, b in combinations(methods, 2):
            mine = [(i, s if (x, y) == (a, b) else 1 - s) for _, i, x, y, s in compared
                    if {x, y} == {a, b}]  # fmt: skip
            if mine:
                pairs.append(_compared(a, b, mine, over_items))
        choices: dict[tuple[str, ...], dict[str, float]] = {}
        for voter, item, a, b, share in compared:
            first, second = sorted((a, b))
            value = share if a == first else 1 - share
            choices.setdefault((item, first, second), {})[voter] = value
        agreed = agreement(choices.values())
    asked = len(key["questions"]) * len(voters)
    return Score(
        design=design,
        study=key["study"],
        voters=voters,
        votes=len(votes),
        unanswered=asked - len(votes),
        rows=rows,
        pairs=pairs,
        agreement=agreed,
    )


def comparisons(vote: Vote) -> list[tuple[str, str, str, str, float]]:
    """A choice or a ranking as (voter, item, a, b, how far a is preferred to b: 1, 0.5, 0)."""
    if isinstance(vote.answer, tuple):
        return [(vote.voter, vote.item, a, b, 1.0) for a, b in combinations(vote.answer, 2)]
    a, b = vote.methods
    share = 0.5 if vote.answer is None else float(vote.answer == a)
    return [(vote.voter, vote.item, a, b, share)]


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927); ties are half a success."""
    share = successes / n
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def as_data(result: Score) -> dict[str, Any]:
    """Everything in plain values."""
    return asdict(result)


def _share(method: str, vote: Vote) -> float:
    """Of a 2AFC how far the method won, of a ranking its place from 1."""
    if isinstance(vote.answer, tuple):
        return 1.0 + vote.answer.index(method)
    return 0.5 if vote.answer is None else float(vote.answer == method)


def _compared(a: str, b: str, shares: list[tuple[str, float]], over_items: Any) -> Pair:
    values = [share for _, share in shares]
    wins, losses = values.count(1.0), values.count(0.0)
    ties = len(values) - wins - losses
    bounds = wilson(sum(values), len(values))
    return Pair(a, b, wins, losses, ties, over_items(shares), bounds)


def _rated(a: str, b: str, votes: Sequence[Vote], over_items: Any) -> Pair:
    """Ratings by one voter of one item, `a` less `b`."""
    given = {(v.voter, v.item, v.methods[0]): float(v.answer) for v in votes}
    gaps = [
        (item, value - given[voter, item, b])
        for (voter, item, method), value in given.items()
        if method == a and (voter, item, b) in given
    ]
    signs = [float(np.sign(gap)) for _, gap in gaps]
    counts = signs.count(1.0), signs.count(-1.0), signs.count(0.0)
    return Pair(a, b, *counts, over_items(gaps), None)


def _vote(voter: str, vote: Any, key: Mapping[str, Any], path: Path) -> Vote:
    """A vote by its key. Raises InputError for an answer that nobody was offered."""
    name = vote.get("question") if isinstance(vote, dict) else None
    if name not in key["questions"]:
        raise InputError(f"there is no question '{name}'", where=str(path))
    shown, answer = key["shown"][name], vote.get("answer")
    whose = key["pictures"]
    design = key["design"]
    offered = {
        "2afc": answer == "tie" or answer in shown,
        "rank": isinstance(answer, list) and sorted(map(str, answer)) == sorted(shown),
        "likert": type(answer) is int and 1 <= answer <= POINTS,
    }
    if not offered[design]:
        problem = f"question {name} cannot be answered with {json.dumps(answer)}"
        raise InputError(problem, where=str(path))
    if design == "2afc":
        answer = None if answer == "tie" else whose[answer]
    elif design == "rank":
        answer = tuple(whose[picture] for picture in answer)
    return Vote(voter, key["questions"][name], tuple(whose[p] for p in shown), answer)


def _once(votes: Sequence[Any], path: Path) -> None:
    """Raise InputError for a question that is answered twice."""
    asked = Counter(vote.get("question") for vote in votes if isinstance(vote, dict))
    if twice := [name for name, count in asked.items() if count > 1]:
        raise InputError(f"question {twice[0]} is answered twice", where=str(path))


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError("there is no such file", where=str(path)) from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read as JSON: {error}", where=str(path)) from error
    return content if isinstance(content, dict) else {}
