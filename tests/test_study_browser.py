"""Studies opened and voted in a real headless browser (make test-browser)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

import browser
from inlay_bench.study import design, material, page, score

pytestmark = pytest.mark.browser
METHODS = ("ours", "theirs", "third")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> material.Material:
    """Pictures of three methods: a disc that each draws elsewhere."""
    place = tmp_path_factory.mktemp("results")
    for i, method in enumerate((*METHODS, "before")):
        (place / method).mkdir()
        for item in range(3):
            picture = Image.new("RGB", (96, 72), (120, 150 + 30 * item, 190))
            if method != "before":
                left = 10 + 25 * i
                ImageDraw.Draw(picture).ellipse((left, 30, left + 24, 54), fill=(200, 60, 40))
            picture.save(place / method / f"scene-{item}.png")
    captions = place / "captions.json"
    captions.write_text(json.dumps({f"scene-{item}": "a ball on the grass" for item in range(3)}))
    return material.gather(
        [place / method for method in METHODS], inputs=place / "before", captions=captions
    )


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[browser.Page]:
    with browser.started(tmp_path / "browser") as opened:
        yield opened


def publish(study: design.Study, place: Path) -> Path:
    path = place / "study.html"
    path.write_text(page.html(study), encoding="utf-8")
    path.with_suffix(".key.json").write_text(json.dumps(study.key))
    return path


def saved(tab: browser.Page, place: Path) -> Path:
    """Save the votes as a voter does, and wait for the file."""
    tab.click("footer .save")
    folder = place / "browser" / "downloads"
    path: Path = tab.until(lambda: next(iter(folder.glob("votes-*.json")), None))
    return path


def count(tab: browser.Page) -> Any:
    return tab.run("document.getElementById('count').textContent")


def test_a_2afc_is_voted_with_mouse_and_keys_and_goes_on_later(
    found: material.Material, tab: browser.Page, tmp_path: Path
) -> None:
    study = design.build(found, "2afc", seed=1, ties=True, against="ours")
    path = publish(study, tmp_path)
    whose, asked = study.key["pictures"], study.page["questions"]
    tab.open(path)
    assert tab.run("document.getElementById('vote').hidden")
    tab.click("#name")
    tab.press(*"Ada", "Enter")
    assert not tab.run("document.getElementById('vote').hidden")
    assert tab.run("document.getElementById('text').textContent") == "a ball on the grass"
    drawn = "[...document.images].every((i) => i.complete && i.naturalWidth === 96)"
    assert tab.until(lambda: tab.run(drawn))
    for question in asked[:3]:  # the mouse, always on ours
        side = [whose[number] for number in question["options"]].index("ours") + 1
        tab.click(f"#options [data-number='{side}']")
    assert count(tab) == "3 of 6"
    tab.open(path)  # the page is closed and opened again
    assert count(tab) == "3 of 6"
    for question in asked[3:5]:  # arrows, always on the other
        ours = [whose[number] for number in question["options"]].index("ours")
        tab.press("ArrowLeft" if ours == 1 else "ArrowRight")
    tab.press("0")
    assert count(tab) == "6 of 6" and not tab.run("document.getElementById('end').hidden")
    tab.press("Backspace")
    assert tab.run("document.querySelector('[data-number=\"0\"]').ariaPressed") == "true"
    votes = saved(tab, tmp_path)
    file = json.loads(votes.read_text())
    assert file["name"] == "Ada" and len(file["voter"]) == 16
    found_score = score.score(*score.read([votes], path.with_suffix(".key.json")))
    totals = [
        sum(getattr(p, kind) for p in found_score.pairs) for kind in ("wins", "losses", "ties")
    ]
    assert totals == [3, 2, 1]


def test_a_ranking_is_made_by_tab_and_enter_alone(
    found: material.Material, tab: browser.Page, tmp_path: Path
) -> None:
    study = design.build(found, "rank", seed=2)
    path = publish(study, tmp_path)
    whose = study.key["pictures"]
    tab.open(path)
    tab.press("Enter")
    for question in study.page["questions"]:
        shown = [whose[number] for number in question["options"]]
        for method in ("third", "ours"):  # what is left is the last
            key = shown.index(method) + 1
            tab.run(f"document.querySelector('#options [data-number=\"{key}\"]').focus()")
            tab.press("Enter")
    assert count(tab) == "3 of 3"
    result = score.score(*score.read([saved(tab, tmp_path)], path.with_suffix(".key.json")))
    assert {row.method: row.value.mean for row in result.rows} == {
        "ours": 2.0,
        "theirs": 3.0,
        "third": 1.0,
    }


def test_ratings_are_typed(found: material.Material, tab: browser.Page, tmp_path: Path) -> None:
    study = design.build(found, "likert", seed=3)
    path = publish(study, tmp_path)
    tab.open(path)
    tab.press("Enter")
    for question in study.page["questions"]:
        method = study.key["pictures"][question["options"][0]]
        tab.press({"ours": "5", "theirs": "2", "third": "3"}[method])
    result = score.score(*score.read([saved(tab, tmp_path)], path.with_suffix(".key.json")))
    assert [row.value.mean for row in result.rows] == [5.0, 2.0, 3.0]


def test_the_page_asks_for_nothing_and_says_nothing_of_methods(
    found: material.Material, tab: browser.Page, tmp_path: Path
) -> None:
    """Every request it makes is for itself; no error is thrown; no name can be seen or read out."""
    path = publish(design.build(found, "2afc"), tmp_path)
    tab.call("Page.enable")
    tab.open(path)
    tab.press("Enter")
    loaded = tab.run("performance.getEntriesByType('resource').map((e) => e.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    refused = tab.run("fetch('https://example.org').then(() => 'sent', (e) => e.name)")
    assert refused == "TypeError"
    seen = tab.run("document.documentElement.outerHTML")
    assert not [method for method in METHODS if method in seen]


@pytest.mark.parametrize("width", [390, 1280])
def test_both_pictures_are_seen_at_once(
    found: material.Material, tmp_path: Path, width: int
) -> None:
    """Side by side without scrolling, on a wide window as on a telephone."""
    path = publish(design.build(found, "2afc", ties=True), tmp_path)
    with browser.started(tmp_path / "browser", width=width) as tab:
        tab.open(path)
        tab.press("Enter")
        tab.screenshot(tmp_path / "page.png")
        boxes = tab.run(
            "[...document.querySelectorAll('#options img, footer')].map((e) => {"
            "const r = e.getBoundingClientRect(); return [r.left, r.right, r.top, r.bottom]; })"
        )
        assert all(left >= 0 and right <= width for left, right, _, _ in boxes), boxes
        assert boxes[0][2] == boxes[1][2] and all(bottom <= 900 for *_, bottom in boxes), boxes
    with Image.open(tmp_path / "page.png") as image:
        assert image.size == (width, 900)
