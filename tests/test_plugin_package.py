"""docs/write-a-plugin.md is true: the plugin runs, its test passes, the package installs."""

import json
import os
import subprocess
import sys

import pytest
import torch

import inlay
import pages
from folders import save_flux
from models import conds, flux, stable_diffusion
from spies import plugin

PACKAGE = "inlay-dynamic-threshold"
PAGE = pages.read("docs/write-a-plugin.md")
FIRST, SESSION, FULL, TEST = pages.blocks(PAGE, "python")
(PROJECT,) = pages.blocks(PAGE, "toml")
(EXPERIMENT,) = pages.blocks(PAGE, "yaml")
WORDS = ["<s>", "a</w>", "dog</w>", "on</w>", "the</w>", "gr", "ass</w>", "</s>", *["<pad>"] * 4]


@pytest.fixture(scope="module", params=[flux, stable_diffusion])
def pipe(request):
    return request.param()


def given(pipe):
    made = conds(pooled=hasattr(pipe, "transformer"))
    return {name: cond | {"tokens": WORDS} for name, cond in made.items()}


def spotlight(code, tmp_path):
    return pages.module(code, tmp_path, "spotlight").Spotlight


def test_the_first_plugin_is_short_and_changes_the_picture(pipe, tmp_path):
    cls = spotlight(FIRST, tmp_path)
    assert len([line for line in FIRST.splitlines() if line.strip()]) <= 20
    run = lambda plugins: inlay.Session(pipe, plugins).run(conds=given(pipe), steps=3)  # noqa: E731
    strong = run({"spotlight": cls(cls.Config(word="dog", weight=5.0))}).latents["edit"]
    neutral = run({"spotlight": cls(cls.Config(word="dog", weight=1.0))}).latents["edit"]
    plain = run({}).latents["edit"]
    torch.testing.assert_close(neutral, plain, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(strong, plain, atol=1e-4)


def test_a_word_that_is_not_in_the_prompt_is_refused(pipe, tmp_path):
    cls = spotlight(FIRST, tmp_path)
    session = inlay.Session(pipe, {"spotlight": cls(cls.Config(word="cat"))})
    with pytest.raises(inlay.InputError, match="'cat' is not in the prompt"):
        session.run(conds=given(pipe), steps=3)


def test_the_documented_test_passes_and_can_fail(pipe, tmp_path, monkeypatch):
    (tmp_path / "spotlight.py").write_text(FULL)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "spotlight", raising=False)
    page = pages.module(TEST, tmp_path, "test_spotlight")
    page.test_the_spotlight_finds_its_word_and_dims_the_rest(pipe, given(pipe))

    class Brightens(page.Spotlight):
        @inlay.hookimpl
        def inlay_final(self, run, result):
            super().inlay_final(run, result)
            result.images["edit"] = result.images["edit"] + 1

    monkeypatch.setattr(page, "Spotlight", Brightens)
    with pytest.raises(AssertionError):
        page.test_the_spotlight_finds_its_word_and_dims_the_rest(pipe, given(pipe))
    monkeypatch.delitem(sys.modules, "spotlight")


def install(project, site):
    """pip builds a project and installs it into a folder, without network."""
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*pip, "--target", str(site), str(project)], check=True)


def cli(site, work, *arguments):
    """The command line in an empty folder, with what is installed in `site` -> stdout."""
    environment = os.environ | {"PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", "from inlay.cli.main import main; main()", *arguments]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_installs_and_runs(tmp_path):
    """pip builds the two files; the command line then lists, plans and runs the plugin by name."""
    project, site, work = tmp_path / "project", tmp_path / "site", tmp_path / "work"
    project.mkdir(), work.mkdir()
    (project / "pyproject.toml").write_text(PROJECT)
    (project / "spotlight.py").write_text(FULL)
    install(project, site)
    model = save_flux(tmp_path / "model")
    (work / "spotlight.yaml").write_text(EXPERIMENT.replace("toybox/flux", str(model)))
    assert json.loads(cli(site, work, "plugins", "--json"))["spotlight"]["source"] == (
        "inlay-spotlight"
    )
    cli(site, work, "run", "spotlight.yaml", "steps=3", "--out", "made")
    manifest = json.loads((work / "made" / "manifest.json").read_text())
    assert manifest["experiment"]["plugins"] == {"spotlight": {"word": "dog", "weight": 1.5}}
    assert list((work / "made" / "images").glob("edit.png"))


# a third party's package, as it would be published ----------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """tests/fixtures/inlay-dynamic-threshold, installed; the source tree is left as it was."""
    folder, project = tmp_path_factory.mktemp("site"), pages.ROOT / "tests/fixtures" / PACKAGE
    before = sorted(project.rglob("*"))
    install(project, folder)
    assert sorted(project.rglob("*")) == before
    return folder


def test_an_installed_package_is_listed_and_its_experiment_runs(site, tmp_path):
    listed = json.loads(cli(site, tmp_path, "plugins", "--json"))
    assert listed["dynamic_threshold"]["source"] == PACKAGE
    experiment = site / "inlay_dynamic_threshold" / "dynamic_threshold.yaml"
    model = save_flux(tmp_path / "model")
    cli(site, tmp_path, "run", str(experiment), f"model={model}", "steps=2", "--out", "made")
    manifest = json.loads((tmp_path / "made" / "manifest.json").read_text())
    assert manifest["experiment"]["plugins"] == {
        "dynamic_threshold": {"percentile": 0.99, "limit": 2.0}
    }


def test_an_installed_plugin_composes_with_ours_by_name(site, pipe, monkeypatch):
    """Its estimates stay within its limit, whatever ours do, and ours act as well."""
    monkeypatch.syspath_prepend(str(site))
    seen = []
    spy = plugin(denoised=lambda step: seen.append(float(step.x0["edit"].abs().max())))
    ours, theirs = {"reweight": {"words": {"dog": 3.0}}}, {"dynamic_threshold": {"limit": 0.5}}

    def run(plugins):
        seen.clear()
        session = inlay.Session(pipe, {**plugins, "spy": spy})
        return session.run(conds=given(pipe), steps=3).latents["edit"], max(seen)

    _, large = run(ours)
    both, small = run(ours | theirs)
    assert large > 0.5 and small <= 0.5 + 1e-6
    assert not torch.allclose(both, run(theirs)[0], atol=1e-4)
    with pytest.raises(inlay.ConfigError, match=r"plugins\.dynamic_threshold: .* is no threshold"):
        run({"dynamic_threshold": {"percentile": 0.0}})
