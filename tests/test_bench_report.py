"""The report: intervals that cover, pairs that are paired, pages that are whole and the same."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import bench_cases
from inlay_bench import intervals, page, report
from inlay_bench.runner import Evaluation


@pytest.fixture
def evaluation(tmp_path: Path) -> Evaluation:
    return bench_cases.evaluate(tmp_path, n=12, methods=("flaky", "plain", "brighter"))


# intervals ---------------------------------------------------------------------------------------


def test_an_interval_agrees_with_scipys_bootstrap() -> None:
    values = np.random.default_rng(1).gamma(2.0, size=150)
    ours = intervals.interval(values, intervals.draws(150))
    theirs = stats.bootstrap((values,), np.mean, method="percentile", rng=2).confidence_interval
    assert ours.mean == pytest.approx(values.mean()) and ours.n == 150
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.05 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.05 * width)


def test_intervals_cover_the_true_mean_as_often_as_they_say() -> None:
    rng, drawn = np.random.default_rng(3), intervals.draws(80, resamples=1000)
    samples = [intervals.interval(rng.normal(size=80), drawn) for _ in range(300)]
    covered = np.mean([s.low <= 0 <= s.high for s in samples])
    print(f"95 % intervals cover {covered:.3f}")
    assert 0.91 <= covered <= 0.98


def test_a_constant_gain_is_certain_however_much_items_differ() -> None:
    base = np.random.default_rng(5).normal(size=60) * 100
    drawn = intervals.draws(60)
    gap = intervals.difference(base + 0.5, base, drawn)
    assert (gap.mean, gap.low, gap.high) == pytest.approx((0.5, 0.5, 0.5))
    assert intervals.interval(base, drawn).high - intervals.interval(base, drawn).low > 30


def test_what_does_not_apply_is_left_out() -> None:
    values = np.array([1.0, math.nan, 3.0, math.nan])
    drawn = intervals.draws(4)
    found = intervals.interval(values, drawn)
    assert (found.mean, found.n) == (2.0, 2) and 1 <= found.low <= found.high <= 3
    nothing = intervals.interval(np.full(4, math.nan), drawn)
    assert nothing.n == 0 and math.isnan(nothing.mean)
    pair = intervals.difference(values, np.array([0.0, 0.0, math.nan, 0.0]), drawn)
    assert (pair.mean, pair.n) == (1.0, 1)


# the three forms ---------------------------------------------------------------------------------


def test_rows_count_failures_and_pair_items(evaluation: Evaluation) -> None:
    summary = report.summarise(evaluation, baseline="plain")
    rows = {row.method: row for row in summary.rows}
    assert (rows["flaky"].failed, rows["flaky"].done) == (2, 10)
    assert rows["flaky"].values["brightness"].n == 10
    assert rows["plain"].differences == {}
    light = rows["brighter"].differences["brightness"]
    assert light.n == 12 and light.mean == pytest.approx(30 / 255, abs=1e-6)
    assert light.low == pytest.approx(light.high, abs=1e-6)
    assert rows["plain"].values["gain"].n == 8  # null for every third item


def test_json_has_every_number_and_null_for_none(evaluation: Evaluation) -> None:
    data = json.loads(json.dumps(report.as_data(report.summarise(evaluation)), allow_nan=False))
    assert [row["method"] for row in data["rows"]] == ["flaky", "plain", "brighter"]
    assert data["tables"]["Light"][0]["key"] == "brightness"
    assert set(data["rows"][1]["values"]["gain"]) == {"mean", "low", "high", "n"}
    assert data["identities"]["plain"]["pictures"]["method"] == {"light": 10}


def test_markdown_tables_are_whole(evaluation: Evaluation) -> None:
    text = report.as_markdown(report.summarise(evaluation))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {4}
    assert "| plain | " in text and "`flaky` failed on 2 items." in text
    assert "nan" not in text


class Tags(HTMLParser):
    """Checks that tags are closed in order, collects addresses and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element without content, such as a path in a drawing."""

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_complete_in_itself(evaluation: Evaluation) -> None:
    text = page.html(report.summarise(evaluation))
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert len(tags.addresses) == 12 * 4 - 2  # input and three methods, less two failed
    assert all(a.startswith("data:image/png;base64,") for a in tags.addresses)
    for words in ("cannot light 0003", "2 failed", "square 11", " lm", "Means over items with 95%"):
        assert words in tags.text, words
    assert len(text) < 200_000


def test_names_and_captions_cannot_break_the_page(evaluation: Evaluation) -> None:
    evaluation.task.summary = "<script>alert(1)</script> & more"
    text = page.html(report.summarise(evaluation))
    assert "<script" not in text and "&lt;script&gt;" in text


def test_the_same_records_give_the_same_bytes(evaluation: Evaluation, tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        report.write(report.summarise(evaluation), folder)
    names = sorted(p.name for p in first.iterdir())
    assert names == ["report.html", "report.json", "report.md"]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_long_evaluation_shows_its_first_items_only(tmp_path: Path) -> None:
    done = bench_cases.evaluate(tmp_path, n=page.SHOWN + 5)
    text = page.html(report.summarise(done))
    assert len(re.findall('class="item"', text)) == page.SHOWN
    assert f"first {page.SHOWN} items" in text
