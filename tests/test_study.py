"""Human studies: the page, its key, the ballot's own script in an engine, the score of votes."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quickjs
from PIL import Image

import bench_cases
from inlay_bench.study import agreement, design, material, page, score
from inlay_config.errors import ConfigError, InputError
from shell import Invoke

Ask = Callable[..., Any]
METHODS = ("ours", "theirs", "third")
PAGE = Path(page.__file__).parent


def folder(place: Path, shade: int, items: int = 6, size: tuple[int, int] = (24, 16)) -> Path:
    """A folder of flat pictures, one shade for the method."""
    place.mkdir(parents=True)
    for i in range(items):
        Image.new("RGB", size, (shade, 10 * i, 0)).save(place / f"scene-{i}.png")
    return place


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [folder(tmp_path / name, 40 + 80 * i) for i, name in enumerate(METHODS)]


def shades(study: design.Study) -> dict[str, str]:
    """Which method made each embedded picture, as its pixels tell."""
    found = {}
    for number, data in study.pictures.items():
        with Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))) as image:
            pixel = image.convert("RGB").getpixel((0, 0))
        assert isinstance(pixel, tuple)
        found[number] = METHODS[(pixel[0] - 40) // 80]
    return found


# the material ------------------------------------------------------------------------------------


def test_folders_of_eval_and_of_pictures_are_read_alike(tmp_path: Path) -> None:
    done = tmp_path / "done"
    bench_cases.evaluate(done, n=5, methods=("plain", "flaky"))
    mine = tmp_path / "mine"
    mine.mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8)).save(mine / f"{i:04d}.webp")
    found = material.gather([done, mine])
    assert found.methods == ["flaky", "plain", "mine"]
    assert found.items == ["0000", "0001", "0002"]  # flaky failed on 0003, mine has no 0004
    assert found.left_out == ["0003", "0004"]
    assert found.texts["0001"] == "square 1"
    assert found.inputs["0001"] == done / "pictures/input/0001.png"
    chosen = material.gather([done], methods=["plain", "flaky"])
    assert chosen.items == ["0000", "0001", "0002", "0004"]


def test_two_methods_of_one_name_go_by_their_folders(tmp_path: Path) -> None:
    for place in ("before", "after"):
        bench_cases.evaluate(tmp_path / place, n=2)
    found = material.gather([tmp_path / "before", tmp_path / "after"])
    assert found.methods == ["before/plain", "after/plain"]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("one", "only ours to vote on"),
        ("no folder", "there is no folder"),
        ("empty", "there are no pictures in it"),
        ("apart", "no item is in all of them: ours has scene-0 and 5 more, apart has other and 0"),
        ("twice", "scene-0.jpg and scene-0.png are of one item"),
        ("gone", "the picture of item '0001' is gone"),
        ("captions", "is not JSON"),
        ("shape", "pictures of item 'scene-.' differ in width by height"),
    ],
)
def test_what_cannot_be_compared_is_named(tmp_path: Path, given: str, problem: str) -> None:
    ours, theirs = folder(tmp_path / "ours", 40), folder(tmp_path / "theirs", 120)
    captions = None
    if given == "one":
        folders = [ours]
    elif given == "no folder":
        folders = [ours, tmp_path / "nowhere"]
    elif given == "gone":
        bench_cases.evaluate(tmp_path / "done", n=2)
        (tmp_path / "done/pictures/plain/0001.png").unlink()
        folders = [tmp_path / "done", ours]
    elif given == "shape":
        folders = [ours, folder(tmp_path / "square", 200, size=(16, 16))]
    elif given == "captions":
        folders, captions = [ours, theirs], tmp_path / "captions.json"
        captions.write_text("scene-0: a dog")
    else:
        folders = [ours, tmp_path / given]
        (tmp_path / given).mkdir()
        names = {"empty": [], "apart": ["other.png"], "twice": ["scene-0.png", "scene-0.jpg"]}
        for name in names[given]:
            Image.new("RGB", (24, 16)).save(tmp_path / given / name)
    with pytest.raises(InputError, match=problem):
        design.build(material.gather(folders, captions=captions))


# the page ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", design.DESIGNS)
def test_the_key_says_whose_the_pictures_are(folders: list[Path], name: str) -> None:
    study = design.build(material.gather(folders), name, seed=4)
    assert study.key["pictures"] == shades(study)
    asked = {"2afc": 18, "rank": 6, "likert": 18}[name]
    assert len(study.page["questions"]) == len(study.key["questions"]) == asked
    shown = Counter(number for q in study.page["questions"] for number in q["options"])
    assert set(shown.values()) == {2 if name == "2afc" else 1} and len(shown) == 18


def test_order_and_sides_come_from_the_seed_and_are_balanced(folders: list[Path]) -> None:
    found = material.gather(folders)
    one, same, other = (design.questions(found, "2afc", seed) for seed in (1, 1, 2))
    assert one == same and one != other and sorted(map(str, one)) != [str(q) for q in one]
    for a, b in (("ours", "theirs"), ("ours", "third"), ("theirs", "third")):
        left = Counter(q.methods[0] for q in one if set(q.methods) == {a, b})
        assert left == {a: 3, b: 3}
    against = design.questions(found, "2afc", 0, n=2, against="ours")
    assert len(against) == 4 and all("ours" in q.methods for q in against)
    assert len({q.item for q in against}) == 2


def test_the_page_is_blind_whole_and_reaches_nothing(folders: list[Path]) -> None:
    study = design.build(material.gather(folders), question="</script> & better?")
    text = page.html(study)
    assert text == page.html(design.build(material.gather(folders), question="</script> & better?"))
    words = re.sub(r'data:image/webp;base64,[^"]+', "", text)
    for hidden in (*METHODS, "scene-", str(folders[0].parent)):
        assert hidden not in words
    assert text.count("</script>") == 3 and "&lt;/script&gt; &amp; better?" in text
    assert not re.search(r"https?:|src=|@import|url\(", words)
    assert "default-src 'none'" in text
    held = re.findall(r'type="application/json" id="(\w+)">(.*?)</script>', text, flags=re.S)
    assert [name for name, _ in held] == ["study", "pictures"]
    assert json.loads(held[0][1])["question"] == "</script> & better?"


def test_small_pictures_lose_nothing_and_large_ones_shrink(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for name, side in (("small", 1), ("large", 30)):
        for method in ("a", "b"):
            (tmp_path / name / method).mkdir(parents=True)
            large = np.kron(noise, np.ones((side, side, 1), np.uint8))
            Image.fromarray(large).save(tmp_path / name / method / "one.png", compress_level=1)
    sizes = {}
    for name in ("small", "large"):
        found = material.gather([tmp_path / name / "a", tmp_path / name / "b"])
        data = design.build(found, side=300).pictures["p0001"]
        with Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))) as image:
            sizes[name] = np.asarray(image.convert("RGB"))
    assert np.array_equal(sizes["small"], noise) and sizes["large"].shape == (200, 300, 3)


# the ballot's script, in an engine ---------------------------------------------------------------


def ballot(study: design.Study, kept: str | None = None, full: bool = False) -> Ask:
    """Ask the page's own ballot, in a JavaScript engine: `ask("choose", 1)`, `ask("answered")`.

    kept: what the store holds. full: the store refuses. The clock ticks a second a look.
    """
    code = (
        (PAGE / "ballot.js").read_text("utf-8")
        + f"""
        let ticks = 0;
        const store = {{
          kept: {json.dumps(kept)},
          getItem() {{ return this.kept; }},
          setItem(_, value) {{ if ({json.dumps(full)}) throw Error("full"); this.kept = value; }},
        }};
        const clock = () => 1000 * ticks++;
        const ballot = new Ballot({json.dumps(study.page)}, store, clock, () => "ada");
        function ask(name, ...words) {{
          const member = ballot[name];
          const value = typeof member === "function" ? member.apply(ballot, words) : member;
          return JSON.stringify({{ value }});
        }}
        """
    )
    engine = quickjs.Function("ask", code)
    return lambda name, *words: json.loads(engine(name, *words)).get("value")


def test_the_script_takes_choices_and_goes_back(folders: list[Path]) -> None:
    study = design.build(material.gather(folders[:2]), "2afc", ties=True)
    ask = ballot(study)
    assert [ask("choose", n) for n in (1, 2, 0, 3)] == [True, True, True, False]
    assert ask("answered") == 3 and ask("back")
    assert ask("given") == "tie" and ask("choose", 1)
    ask = ballot(study, kept=ask("store")["kept"])  # the page is opened once more
    assert ask("state")["at"] == 3
    assert [ask("choose", 2) for _ in range(3)] == [True] * 3
    assert ask("finished") and not ask("choose", 1)
    votes = ask("file")
    shown = [q["options"] for q in study.page["questions"]]
    assert [v["shown"] for v in votes["votes"]] == shown
    assert [v["answer"] for v in votes["votes"]] == [
        options[side] for options, side in zip(shown, (0, 1, 0, 1, 1, 1), strict=True)
    ]
    assert (votes["study"], votes["voter"], votes["seed"]) == (study.page["id"], "ada", 0)
    assert all(v["seconds"] > 0 for v in votes["votes"])


def test_the_script_orders_and_rates(folders: list[Path]) -> None:
    study = design.build(material.gather(folders), "rank")
    ask = ballot(study)
    assert ask("choose", 3) and ask("choose", 3)  # taken out again
    assert ask("answered") == 0 and not ask("choose", 0)
    assert ask("choose", 2) and ask("choose", 3)  # 1 is the last
    first = study.page["questions"][0]["options"]
    assert ask("file")["votes"][0]["answer"] == [first[1], first[2], first[0]]
    ask = ballot(design.build(material.gather(folders), "likert"))
    assert [ask("choose", n) for n in (0, 6, 5)] == [False, False, True]


def test_the_script_survives_a_store_that_is_broken_or_full(folders: list[Path]) -> None:
    study = design.build(material.gather(folders), "likert")
    for kept in ("{torn", "null", '{"answers": {}, "at": 999}'):
        assert ballot(study, kept)("state")["at"] == 0
    ask = ballot(study, full=True)
    assert ask("choose", 3) and ask("answered") == 1


# votes -------------------------------------------------------------------------------------------


def write_votes(place: Path, study: design.Study, voter: str, judge: Callable[..., Any]) -> Path:
    """A file of votes as the page saves it. judge: (item, methods shown) -> answer by method."""
    whose = study.key["pictures"]
    votes = []
    for question in study.page["questions"]:
        shown = {whose[number]: number for number in question["options"]}
        answer = judge(study.key["questions"][question["id"]], list(shown))
        if isinstance(answer, list):
            answer = [shown[method] for method in answer]
        votes.append({"question": question["id"], "answer": shown.get(answer, answer)
                      if isinstance(answer, str) else answer})  # fmt: skip
    path = place / f"{voter}.json"
    file = {"inlay_votes": 1, "study": study.page["id"], "voter": voter, "votes": votes}
    path.write_text(json.dumps(file))
    return path


def scored(place: Path, study: design.Study, **judges: Callable[..., Any]) -> score.Score:
    key = place / "study.key.json"
    key.write_text(json.dumps(study.key))
    paths = [write_votes(place, study, voter, judge) for voter, judge in judges.items()]
    return score.score(*score.read(paths, key))


def test_preferences_count_wins_losses_and_ties(folders: list[Path], tmp_path: Path) -> None:
    study = design.build(material.gather(folders[:2]), "2afc", ties=True)

    def ada(item: str, methods: list[str]) -> str:
        return {"scene-0": "theirs", "scene-1": "tie"}.get(item, "ours")

    found = scored(tmp_path, study, ada=ada)
    (pair,) = found.pairs
    assert (pair.a, pair.b) == ("ours", "theirs")
    assert (pair.wins, pair.losses, pair.ties) == (4, 1, 1)
    assert pair.estimate.mean == pytest.approx(0.75) and pair.estimate.n == 6
    assert pair.estimate.low < 0.75 < pair.estimate.high <= 1
    assert pair.wilson == pytest.approx(score.wilson(4.5, 6))
    assert [row.value.mean for row in found.rows] == pytest.approx([0.75, 0.25])
    assert found.agreement is None and (found.votes, found.unanswered) == (6, 0)


def test_wilsons_interval_is_the_published_one() -> None:
    from scipy.stats import binomtest

    for wins, n in ((0, 10), (7, 9), (30, 30), (41, 100)):
        known = binomtest(wins, n).proportion_ci(method="wilson")
        assert score.wilson(wins, n) == pytest.approx((known.low, known.high), abs=1e-6)


def test_rankings_give_mean_ranks_and_pairs(folders: list[Path], tmp_path: Path) -> None:
    study = design.build(material.gather(folders), "rank")

    def ada(item: str, methods: list[str]) -> list[str]:
        return ["theirs", "ours", "third"] if item < "scene-2" else ["ours", "third", "theirs"]

    found = scored(tmp_path, study, ada=ada, bob=ada)
    assert [row.value.mean for row in found.rows] == pytest.approx([4 / 3, 7 / 3, 7 / 3])
    pairs = {(p.a, p.b): p for p in found.pairs}
    assert pairs["ours", "theirs"].estimate.mean == pytest.approx(2 / 3)
    assert (pairs["ours", "third"].wins, pairs["ours", "third"].losses) == (12, 0)
    assert found.agreement == agreement.Agreement(1.0, 1.0, 18)


def test_ratings_are_paired_by_voter_and_item(folders: list[Path], tmp_path: Path) -> None:
    study = design.build(material.gather(folders[:2]), "likert")

    def strict(item: str, methods: list[str]) -> int:
        return 3 if methods == ["ours"] else 2

    def mild(item: str, methods: list[str]) -> int:
        return 5 if methods == ["ours"] else 4

    found = scored(tmp_path, study, ada=strict, bob=mild)
    assert [row.value.mean for row in found.rows] == [4.0, 3.0]
    (pair,) = found.pairs
    assert (pair.estimate.mean, pair.estimate.low, pair.estimate.high) == (1, 1, 1)
    assert (pair.wins, pair.losses, pair.ties, pair.wilson) == (12, 0, 0, None)
    assert found.agreement is not None and found.agreement.share == 0


def test_agreement_is_krippendorffs() -> None:
    """His own examples (2011): two observers, nominal, alpha 0.095; four observers with gaps,
    interval 0.849, nominal 0.743."""
    a, b = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    found = agreement.agreement([{"a": x, "b": y} for x, y in zip(a, b, strict=True)])
    assert found is not None and found.alpha == pytest.approx(0.095, abs=5e-4)
    assert (found.share, found.pairs) == (0.6, 10)
    rows = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")
    columns = [
        {str(i): float(row[k]) for i, row in enumerate(rows) if row[k] != "."} for k in range(12)
    ]
    for scale, known in ((4, 0.849), (0, 0.743)):
        found = agreement.agreement(columns, scale)
        assert found is not None and found.alpha == pytest.approx(known, abs=5e-4)
    assert agreement.agreement([{"a": 1.0}]) is None
    same = agreement.agreement([{"a": 1.0, "b": 1.0}])
    assert same is not None and same.alpha is None


def test_intervals_take_items_not_votes_as_draws(tmp_path: Path) -> None:
    """Ten voters who say the same of few items know no more than one."""
    ours, theirs = folder(tmp_path / "ours", 40, 20), folder(tmp_path / "theirs", 120, 20)
    study = design.build(material.gather([ours, theirs]))

    def judge(item: str, methods: list[str]) -> str:
        return "ours" if int(item.split("-")[1]) < 14 else "theirs"

    one = scored(tmp_path, study, ada=judge).pairs[0]
    ten = scored(tmp_path, study, **{f"v{i}": judge for i in range(10)}).pairs[0]
    assert (one.estimate.low, one.estimate.high) == (ten.estimate.low, ten.estimate.high)
    assert one.wilson and ten.wilson and ten.wilson[0] > one.wilson[0]


# the commands ------------------------------------------------------------------------------------


def test_the_commands_make_a_page_and_score_its_votes(
    folders: list[Path], tmp_path: Path, invoke: Invoke
) -> None:
    code, out, err = invoke("study", *folders[:2], "--out", "pages/mine.html", "--seed", 3)
    assert code == 0, err
    assert "6 questions on ours, theirs" in out and "keep it from voters" in out
    written = tmp_path / "pages"
    assert sorted(p.name for p in written.iterdir()) == ["mine.html", "mine.key.json"]
    study = design.build(material.gather(folders[:2]), seed=3)
    assert (written / "mine.html").read_text("utf-8") == page.html(study)
    votes = write_votes(written, study, "ada", lambda item, methods: "ours")
    code, out, err = invoke("study-score", votes)  # the key lies beside it
    assert code == 0 and "1.000" in out and "6 votes of 1 voters" in out, err
    code, out, _ = invoke("study-score", votes, "--key", written / "mine.key.json", "--json")
    data = json.loads(out)
    assert data["pairs"][0]["wins"] == 6 and data["pairs"][0]["estimate"]["mean"] == 1.0


@pytest.mark.parametrize(
    ("name", "answer", "shown"),
    [
        ("2afc", "ours", ("1.000 [1.000, 1.000]", "12/0/0", "[0.758, 1.000]", "alpha undefined")),
        ("rank", ["ours", "theirs"], ("2.000 [2.000, 2.000]", "12/0/0", "alpha undefined")),
        ("likert", 4, ("4.000 [4.000, 4.000]", "0/0/12", "+0.000 [+0.000, +0.000]")),
    ],
)
def test_every_design_is_told_in_eighty_columns(
    folders: list[Path],
    tmp_path: Path,
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    answer: Any,
    shown: tuple[str, ...],
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    study = design.build(material.gather(folders[:2]), name)
    (tmp_path / "study.key.json").write_text(json.dumps(study.key))
    voters = [write_votes(tmp_path, study, v, lambda item, methods: answer) for v in ("ada", "bob")]
    code, out, err = invoke("study-score", *voters)
    assert code == 0, err
    assert all(words in out for words in shown) and "…" not in out, out


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("study", "these are votes on another page"),
        ("question", "there is no question 'q9999'"),
        ("answer", "question q0001 cannot be answered with"),
        ("nothing", "is no file of votes"),
        ("torn", "cannot be read as JSON"),
        ("twice", "the same voter as in ada.json"),
        ("again", "question q0001 is answered twice"),
        ("empty", "there are no votes"),
        ("no key", "0 keys lie beside the votes"),
        ("wrong key", "is no key of a study"),
        ("missing", "there is no such file"),
    ],
)
def test_votes_that_do_not_fit_are_named(
    folders: list[Path], tmp_path: Path, invoke: Invoke, change: str, problem: str
) -> None:
    study = design.build(material.gather(folders[:2]))
    path = write_votes(tmp_path, study, "ada", lambda item, methods: "ours")
    key = tmp_path / "study.key.json"
    if change != "no key":
        key.write_text(json.dumps({} if change == "wrong key" else study.key))
    file = json.loads(path.read_text())
    given = [path]
    if change == "study":
        file["study"] = "0" * 16
    elif change == "question":
        file["votes"][0]["question"] = "q9999"
    elif change == "answer":
        file["votes"] = [{"question": "q0001", "answer": "p9999"}]
    elif change == "again":
        file["votes"].append(file["votes"][0])
    elif change == "nothing":
        file = {"what": "else"}
    elif change == "empty":
        file["votes"] = []
    elif change == "twice":
        given.append(tmp_path / "again.json")
        given[1].write_text(json.dumps(file))
    path.write_text(json.dumps(file)[: -3 if change == "torn" else None])
    if change == "missing":
        path.unlink()
    code, _, err = invoke("study-score", *given)
    assert code == 2 and problem in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--design", "vote"), "no design 'vote'"),
        (("--against", "fourth"), "no method 'fourth'"),
        (("--methods", "ours,fourth"), "no method 'fourth'"),
        (("--out", "mine.txt"), "is no page"),
        (("--out", "../mine.html"), "climbs out of"),
        (("--n", 0), "must be 1 or more"),
    ],
)
def test_what_a_study_cannot_be_is_named(
    folders: list[Path], invoke: Invoke, words: tuple[object, ...], problem: str
) -> None:
    code, _, err = invoke("study", *folders, *words)
    assert code == 2 and problem in err and "Traceback" not in err


def test_an_unknown_design_is_refused_from_python_too(folders: list[Path]) -> None:
    with pytest.raises(ConfigError, match="2afc, rank, likert"):
        design.build(material.gather(folders), "vote")
