"""`inlay eval`: what is run, what is resumed, what is refused, and what is measured."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import bench_cases
import folders
import inlay_toybox
import pages
from inlay.cli.experiment import execute
from inlay_bench import measures, methods, pictures, runner, tasks
from inlay_bench.measures import MEASURES, NETWORKS
from inlay_config import config
from inlay_config.errors import ConfigError, InlayError, InputError, ModelError, PluginError
from shell import Invoke


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(folders.save_flux(tmp_path_factory.mktemp("flux")))


@pytest.fixture
def invoke(invoke: Invoke) -> Invoke:
    """Run `inlay eval WORDS...`."""
    return partial(invoke, "eval")


# running and resuming ----------------------------------------------------------------------------


def test_only_what_is_missing_is_run(tmp_path: Path) -> None:
    bench_cases.evaluate(tmp_path, n=4)
    again = bench_cases.method("plain")
    done = runner.evaluate(bench_cases.task(), [again], tmp_path, 6)
    assert again.asked == ["0004", "0005"]
    assert list(done.records["plain"]) == [f"{i:04d}" for i in range(6)]


def test_a_failing_item_is_recorded_counted_and_done_again_when_asked(tmp_path: Path) -> None:
    done = bench_cases.evaluate(tmp_path, n=10, methods=("flaky", "plain"))
    failed = {k: r["error"] for k, r in done.records["flaky"].items() if r["state"] == "failed"}
    assert failed == {k: f"RuntimeError: cannot light {k}" for k in ("0003", "0007")}
    assert len(done.records["plain"]) == 10

    mended = bench_cases.Brighter("flaky", 20)
    runner.evaluate(bench_cases.task(), [mended], tmp_path, 10)
    assert mended.asked == []
    done = runner.evaluate(bench_cases.task(), [mended], tmp_path, 10, retry_failed=True)
    assert mended.asked == ["0003", "0007"]
    assert {r["state"] for r in done.records["flaky"].values()} == {"done"}


def test_an_interrupt_keeps_what_is_done(tmp_path: Path) -> None:
    class Interrupted(bench_cases.Brighter):
        def __call__(self, item: tasks.Item, source: Image.Image) -> Image.Image:
            if item.id == "0002":
                raise KeyboardInterrupt
            return super().__call__(item, source)

    with pytest.raises(KeyboardInterrupt):
        runner.evaluate(bench_cases.task(), [Interrupted("plain", 10)], tmp_path, 5)
    again = bench_cases.method("plain")
    runner.evaluate(bench_cases.task(), [again], tmp_path, 5)
    assert again.asked == ["0002", "0003", "0004"]


def test_a_changed_method_task_or_input_is_refused(tmp_path: Path) -> None:
    bench_cases.evaluate(tmp_path, n=2)
    lighter = bench_cases.Brighter("plain", 11)
    with pytest.raises(InputError, match=r"method\.light: 10 -> 11"):
        runner.evaluate(bench_cases.task(), [lighter], tmp_path, 2)
    with pytest.raises(InputError, match="seed: 0 -> 1"):
        bench_cases.evaluate(tmp_path, n=2, seed=1)
    runner.evaluate(bench_cases.task(), [lighter], tmp_path, 2, restart=True)
    assert (tmp_path / "replaced-1" / "plain.jsonl").is_file()
    assert lighter.asked == ["0000", "0001"]


def test_pictures_are_measured_again_without_being_made_again(tmp_path: Path) -> None:
    before = bench_cases.evaluate(tmp_path, n=4, methods=("flaky",))
    again, task = bench_cases.Brighter("flaky", 20), bench_cases.task()
    task.measures = ["test-brightness", "footprint"]
    with pytest.raises(InputError, match=r"measures\.named.*--remeasure"):
        runner.evaluate(task, [again], tmp_path, 4)
    done = runner.evaluate(task, [again], tmp_path, 4, remeasure=True)
    assert again.asked == ["0003"]  # it had failed and left no picture
    old, new = (e.records["flaky"]["0001"] for e in (before, done))
    assert new["numbers"]["brightness"] == old["numbers"]["brightness"]
    assert new["numbers"]["psnr_strict"] < 99 and new["seconds"] == old["seconds"]


def test_a_picture_of_something_else_or_broken_is_made_again(tmp_path: Path) -> None:
    bench_cases.evaluate(tmp_path, n=3)
    paths = [pictures.path_of(tmp_path, "plain", f"{i:04d}") for i in range(3)]
    paths[0].write_bytes(paths[0].read_bytes()[:60])
    Image.new("RGB", (8, 8)).save(paths[1])
    again = bench_cases.method("plain")
    runner.evaluate(bench_cases.task(), [again], tmp_path, 3, remeasure=True)
    assert again.asked == ["0000", "0001"]


def test_inputs_are_drawn_once_and_again_when_something_else_draws_them(tmp_path: Path) -> None:
    class Artist(bench_cases.Brighter):
        def __call__(self, item: tasks.Item, source: Image.Image) -> Image.Image:
            return super().__call__(item, Image.new("RGB", (8, 8), (item.seed, 0, 0)))

    task = bench_cases.task(bare=True)
    task.inputs = "drawn"

    def drawn(artist: Artist, **more: Any) -> runner.Evaluation:
        return runner.evaluate(task, [methods.Copy()], tmp_path, 3, draw=artist, **more)

    draw, other = Artist("draw", 10), Artist("draw", 40)
    first = drawn(draw)
    drawn(draw, remeasure=True)
    assert draw.asked == ["0000", "0001", "0002"]
    with pytest.raises(InputError, match=r"pictures\.drawn by\.method\.light: 10 -> 40"):
        drawn(other)
    second = drawn(other, remeasure=True)
    assert other.asked == draw.asked
    light = [e.records["copy"]["0000"]["numbers"]["brightness"] for e in (first, second)]
    assert light[1] > light[0]


def test_an_input_that_is_not_the_recorded_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench_cases.evaluate(tmp_path, n=2)

    def darker(seed: int) -> Any:
        for item in bench_cases.squares(seed):
            yield tasks.Item(item.id, Image.new("RGB", (8, 8)), item.texts, item.seed)

    monkeypatch.setitem(tasks.PROVIDERS, "test-squares", darker)
    with pytest.raises(InputError, match="item 0000: its input has changed"):
        bench_cases.evaluate(tmp_path, n=2)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"twice": True}, "two items are called '0000'"),
        ({"empty": True}, "it has no items"),
        ({"bare": True}, "item '0000' has no picture"),
        ({"colour": "red"}, "unexpected keyword argument 'colour'"),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused(
    tmp_path: Path, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InlayError, match=problem):
        runner.evaluate(bench_cases.task(**options), [bench_cases.method("plain")], tmp_path, 3)
    assert not list(tmp_path.glob("*.jsonl"))


# naming ------------------------------------------------------------------------------------------


def test_shipped_tasks_are_whole() -> None:
    published = ["affordance-set", "coco-exemplar", "emu-edit", "ip2p-tradeoff", "magicbrush"]
    published += ["mimicbrush-bench", "pie-bench"]
    toybox = ["additing", "affordance", "beside", "blending", "exemplar", "imitation"]
    toybox += ["instructions", "tradeoff"]
    assert tasks.names() == [*published, *(f"toybox-{name}" for name in toybox)]
    for name in tasks.names():
        task = tasks.load(name)
        assert task.n >= 200 and set(task.measures) <= set(MEASURES)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("data: {provider: toybox-insertio}", "no 'toybox-insertio'.*'toybox-insertion'"),
        ("measures: [inclusio]", "no 'inclusio'.*'inclusion'"),
        ("run: {prompt.edits: target}", "no 'prompt.edits'"),
        ("inputs: found", "no 'found'"),
        ("n: 0", "n: must be one or more"),
        ("measures: []", "measures: must be one or more"),
        ("colour: red", "colour"),
        ("[1, 2]", "cannot be read"),
        ("data: !!python/object:os.system {}", "cannot be read"),
    ],
)
def test_a_broken_task_file_is_named(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "mine.yaml"
    whole = {
        "summary": "mine",
        "data": "{provider: toybox-insertion}",
        "measures": "[inclusion]",
        "n": "3",
    }
    key = text.split(":")[0]
    lines = [f"{k}: {v}" for k, v in whole.items() if k != key]
    path.write_text("\n".join([*lines, text]))
    with pytest.raises(ConfigError, match=problem) as refused:
        tasks.load(str(path))
    assert "mine.yaml" in str(refused.value)


def test_unknown_names_are_refused(invoke: Invoke) -> None:
    for words, problem in (
        (("toybox-affordanc",), "Did you mean 'toybox-affordance'?"),
        (("toybox-affordance", "--methods", "addi"), "Did you mean 'addit'?"),
        (("toybox-affordance", "--methods", "copy,copy"), "the name 'copy' is taken"),
        (("toybox-affordance", "--retry", "all"), "Say failed."),
        (("toybox-affordance", "--n", 0), "It must be 1 or more."),
        (("toybox-affordance", "--baseline", "addit"), "One of copy, vae."),
        (("toybox-affordance", "--methods", "t2i", "steps=none"), "steps"),
    ):
        code, _, err = invoke(*words)
        assert code == 2 and problem in err and "Traceback" not in err
    assert list(Path().iterdir()) == []


def test_the_sanity_rows_are_always_there() -> None:
    task = tasks.load("toybox-affordance")
    assert [m.name for m in methods.build(["addit"], task)] == ["addit", "copy", "vae"]
    assert [m.name for m in methods.build(["vae", "t2i"], task)] == ["vae", "t2i", "copy"]


def test_a_methods_identity_holds_what_its_pictures_depend_on() -> None:
    task = tasks.load("toybox-affordance")
    plain, other = (methods.build(["addit"], task, o)[0] for o in ([], ["steps=5"]))
    assert plain.identity["method"]["steps"] == 28 and other.identity["method"]["steps"] == 5
    assert plain.identity["plugins"] == {"inlay": "0.1.0"}
    assert len(plain.identity["weights"]) == 64
    assert not {"subject", "seed", "input"} & plain.identity["method"].keys()
    assert plain.identity["method"]["prompt"] == {"negative": ""}  # the others are the item's
    assert json.loads(json.dumps(plain.identity)) == plain.identity


# the command -------------------------------------------------------------------------------------


def test_one_command_makes_the_report_and_goes_on(invoke: Invoke, model: str) -> None:
    words = ("toybox-affordance", f"model={model}", "--methods", "twin", "--out", "cmp")
    code, out, _ = invoke(*words, "--n", 2)
    assert code == 0 and "cmp/report.html" in out and "affordance" in out
    assert {p.name for p in Path("cmp").iterdir()} >= {"twin.jsonl", "copy.jsonl", "vae.jsonl"}
    before = Path("cmp/vae.jsonl").read_text()
    code, out, _ = invoke(*words, "--n", 3, "--json", "--baseline", "copy")
    assert code == 0 and Path("cmp/vae.jsonl").read_text().startswith(before)
    data = json.loads(out)
    rows = {row["method"]: row["values"] for row in data["rows"]}
    assert rows["twin"]["inclusion"]["mean"] == 1 and rows["copy"]["inclusion"]["mean"] == 0
    assert rows["copy"]["psnr"]["mean"] == 99 and 0 < rows["vae"]["psnr"]["mean"] < 99
    assert data["baseline"] == "copy" and data["items"] == 3


def test_a_method_that_cannot_read_some_captions_fails_on_those(invoke: Invoke, model: str) -> None:
    """The tiny model spells prompts in 32 letters at most."""
    words = ("toybox-affordance", f"model={model}", "steps=2", "size=64")
    code, out, err = invoke(*words, "--methods", "t2i", "--n", 6, "--out", "cmp", "--json")
    row = next(row for row in json.loads(out)["rows"] if row["method"] == "t2i")
    assert code == 0 and row["failed"] and row["done"] and row["failed"] + row["done"] == 6, err


def test_a_model_that_cannot_be_loaded_ends_the_run_before_any_item(
    invoke: Invoke, model: str, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["x_embedder.weight"] = torch.zeros(3, 3)
    save_file(tensors, weights)
    words = ("toybox-affordance", f"model={broken}", "--methods", "t2i", "--n", 2, "--out", "cmp")
    code, _, err = invoke(*words)
    assert code == 2 and "cannot be loaded" in err and "x_embedder.weight" in err
    assert len(Path("cmp/t2i.jsonl").read_text().splitlines()) == 1


def test_an_interrupted_command_says_how_to_go_on(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "attempt", interrupted)
    code, _, err = invoke("toybox-affordance", "--methods", "twin", "--n", 2, "--out", "cmp")
    assert code == 130 and "what is done stays in cmp; the same command goes on" in err


def test_what_is_not_installed_is_named(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torchmetrics'] = None\n"
    code += "from inlay.cli.main import main\nmain()"
    words = [sys.executable, "-c", code, "eval", "toybox-affordance"]
    ended = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2 and "pip install 'inlay[bench]'" in ended.stderr


def test_tasks_are_listed(invoke: Invoke) -> None:
    code, out, _ = invoke("--json")
    assert code == 0 and set(json.loads(out)) == set(tasks.names())
    assert "toybox-additing" in invoke()[1]


def test_weights_of_the_wrong_shape_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "detector"
    shutil.copytree(inlay_toybox.path("detector"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["head.2.bias"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors")
    monkeypatch.setattr(inlay_toybox, "path", lambda name: tmp_path / name)
    with pytest.raises(ModelError, match=r"detector: cannot be loaded: .*head\.2\.bias"):
        measures.detector()


def test_what_no_network_can_measure_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> Any:
        raise ModelError("has not been fetched", where="the network lpips")

    monkeypatch.setitem(NETWORKS, "lpips", absent)
    task = bench_cases.task()
    task.measures = ["test-brightness", "footprint-lpips"]
    done = runner.evaluate(task, [bench_cases.method("plain")], tmp_path, 1)
    assert list(done.measures) == ["test-brightness"]
    assert "has not been fetched" in done.absent["footprint-lpips"]


# the toybox's tasks ------------------------------------------------------------------------------


def test_the_toyboxs_truth_scores_as_it_should(tmp_path: Path) -> None:
    """The true twin is perfect, the input unedited has no object, an object elsewhere may stand
    wrongly but leaves the background alone."""
    task = tasks.load("toybox-affordance")
    wanted = ("inclusion", "affordance", "boxes", "contact", "clip", "background", "footprint")
    task.measures = list(wanted)
    rows = [methods.Twin(), methods.Twin(elsewhere=True), methods.Copy()]
    done = runner.evaluate(task, rows, tmp_path, 12)
    means = {name: mean(done, name) for name in ("twin", "elsewhere", "copy")}
    for key in ("inclusion", "affordance", "affordance_all", "contact", "ssim_strict"):
        assert means["twin"][key] == pytest.approx(1, abs=1e-4), key
    assert means["twin"]["psnr"] == means["twin"]["psnr_strict"] == 99
    assert means["elsewhere"]["inclusion"] == 1
    assert means["elsewhere"]["affordance"] < 1
    assert means["elsewhere"]["psnr"] > means["elsewhere"]["psnr_strict"] + 20
    assert means["copy"]["inclusion"] == means["copy"]["affordance_all"] == 0
    assert means["twin"]["clip_direction"] > 0.6 > means["copy"]["clip_direction"] == 0
    assert means["twin"]["clip_out"] > means["copy"]["clip_out"] + 0.2
    assert means["copy"]["clip_image"] == pytest.approx(1)
    assert np.isnan(means["copy"]["affordance"]) and np.isnan(means["copy"]["contact"])


def mean(done: runner.Evaluation, method: str) -> dict[str, float]:
    """Column -> mean over the items to which it applies."""
    found: dict[str, list[float]] = {}
    for record in done.records[method].values():
        assert record["state"] == "done", record
        for key, value in record["numbers"].items():
            found.setdefault(key, []).extend([] if value is None else [value])
    return {key: float(np.mean(values)) if values else np.nan for key, values in found.items()}


def test_affordance_of_an_item_that_knows_no_region_is_a_failed_record(tmp_path: Path) -> None:
    task = bench_cases.task()
    task.measures = ["affordance"]
    done = runner.evaluate(task, [bench_cases.method("plain")], tmp_path, 1)
    record = done.records["plain"]["0000"]
    assert record["state"] == "failed" and "no allowed region" in record["error"]


def test_drawn_inputs_are_what_the_method_draws_again(tmp_path: Path) -> None:
    """toybox-additing: text to image and Add-it's regenerated source agree to the last bit."""
    task = tasks.load("toybox-additing")
    task.measures = ["inclusion", "source"]
    over = ["steps=2"]
    addit = methods.build(["addit"], task, over)[0]
    done = runner.evaluate(task, [addit], tmp_path, 1, draw=methods.drawer(task, over))
    assert done.records["addit"]["0000"]["state"] == "done", done.records
    assert isinstance(addit, methods.Edit)
    item = done.items[0]
    words = ["steps=2", *(f"{key}={item.texts[text]}" for key, text in task.run.items())]
    exp = config.load("addit", [*words, f"plugins.source_trajectory.seed={item.seed}"])
    result = execute(exp)
    with Image.open(pictures.path_of(tmp_path, "input", item.id)) as drawn:
        again = (result.images["source"][0].permute(1, 2, 0) * 255).round().byte().numpy()
        assert np.array_equal(np.asarray(drawn), again)


# other packages ----------------------------------------------------------------------------------


def test_the_documented_provider_and_measure_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = pages.read("docs/benchmarks.md")
    (code,) = pages.blocks(page, "python")
    (tmp_path / "my_bench.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("my_bench", "my_bench", "inlay.bench")
    monkeypatch.setattr(tasks, "entry_points", lambda group: [point])
    path = tmp_path / "dark.yaml"
    path.write_text(
        "{summary: dark, data: {provider: grey-squares, options: {side: 8}}, measures: [darkness]}"
    )
    done = runner.evaluate(tasks.load(str(path)), [methods.Copy()], tmp_path / "out", 3)
    assert mean(done, "copy")["darkness"] == pytest.approx(1 - 1 / 255)


def test_a_package_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("theirs", "not_installed_bench", "inlay.bench")
    monkeypatch.setattr(tasks, "entry_points", lambda group: [point])
    with pytest.raises(PluginError, match=r"entry point theirs \(not_installed_bench\)"):
        tasks.load("toybox-affordance")


def test_the_documented_task_loads(tmp_path: Path) -> None:
    (text,) = pages.blocks(pages.read("docs/benchmarks.md"), "yaml")
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert tasks.load(str(path)).n == 50


def test_every_column_and_task_is_documented() -> None:
    page = pages.read("docs/benchmarks.md")
    for name in tasks.names():
        assert f"`{name}`" in page
        for measure in tasks.load(name).measures:
            for column in MEASURES[measure].columns:
                assert column.title.removesuffix(", dB") in page, column.title
