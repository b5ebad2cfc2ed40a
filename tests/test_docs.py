"""The documentation is complete and true: hooks, registry, links, commands, every snippet."""

import inspect
import re
import shlex
import subprocess

import pytest
import torch
import yaml

import inlay
import pages
from inlay import hookspecs
from inlay_config import config, registry
from models import conds, flux, stable_diffusion

HOOKS = {n: f for n, f in vars(hookspecs).items() if n.startswith("inlay_")}
PAGES = sorted([*pages.ROOT.glob("*.md"), *pages.ROOT.glob("docs/*.md")])
TESTS = "\n".join(p.read_text(encoding="utf-8") for p in pages.ROOT.glob("tests/test_*.py"))
README = pages.read("README.md")


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_with_its_exact_signature(hook):
    signature = str(inspect.signature(HOOKS[hook])).replace("'", "")
    headings = [h.strip("`") for h in pages.sections(pages.read("docs/hooks.md"))]
    assert f"{hook}{signature}" in headings


def test_no_hook_is_documented_that_does_not_exist():
    headings = [h.strip("`") for h in pages.sections(pages.read("docs/hooks.md"))]
    assert [h.split("(")[0] for h in headings] == list(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_test_named_after_it(hook):
    assert f"def test_{hook}(" in TESTS


@pytest.mark.parametrize(
    "name", [n for n, e in registry.plugins().items() if e["source"] == "inlay"]
)
def test_every_plugin_is_used_by_an_experiment_and_mentioned_in_the_docs(name):
    files = config.data_path("experiments").rglob("*.yaml")
    used = [
        path for path in files if name in (yaml.safe_load(path.read_text()).get("plugins") or {})
    ]
    assert used, f"no experiment lists {name}"
    assert any(f"`{name}`" in page.read_text(encoding="utf-8") for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files_that_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_code_block_is_of_its_language(page):
    text = page.read_text(encoding="utf-8")
    for code in pages.blocks(text, "python"):
        compile(code, page.name, "exec")
    for code in pages.blocks(text, "yaml"):
        assert isinstance(yaml.safe_load(code), dict)


MAKE = subprocess.run(["make", "-pRrq"], cwd=pages.ROOT, capture_output=True, text=True).stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_exists(page):
    """`make X` is a target, `inlay X` a verb, an experiment that is named is there."""
    from typer.main import get_command

    from inlay.cli.main import app

    command = get_command(app)
    verbs = command.list_commands(command.make_context("inlay", [], resilient_parsing=True))
    for block in pages.blocks(page.read_text(encoding="utf-8"), "sh"):
        for line in filter(None, (ln.split("#")[0].strip() for ln in block.splitlines())):
            words = shlex.split(line)
            if words[0] == "make":
                assert re.search(rf"^{words[1]}:", MAKE, flags=re.M), line
            elif words[0] == "inlay":
                assert words[1] in verbs, line
                if words[1] in ("run", "plan") and not words[2].endswith(".yaml"):
                    config.load(words[2], [w for w in words[3:] if "=" in w and "out" not in w])


# the README's snippets ------------------------------------------------------------------------


def test_the_readme_experiment_is_short_and_loads(tmp_path):
    (code, *_) = pages.blocks(README, "yaml")
    assert len(code.splitlines()) <= 12
    path = tmp_path / "mine.yaml"
    path.write_text(code)
    loaded = config.load(path)
    assert "weighted_attention" in config.expand_presets(loaded.plugins)


def test_the_readme_plugin_is_short_and_changes_the_picture(tmp_path):
    code = next(c for c in pages.blocks(README, "python") if "hookimpl" in c)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    cls = pages.module(code, tmp_path, "emphasis").Emphasis
    tokens = ["a</w>", "dog</w>", *["<pad>"] * 10]
    for pipe in (flux(), stable_diffusion()):
        given = conds(pooled=hasattr(pipe, "transformer"))
        given["edit"]["tokens"] = tokens
        latents = []
        for weight in (1.0, 5.0):
            plugin = cls(cls.Config(word="dog", weight=weight))
            session = inlay.Session(pipe, {"emphasis": plugin})
            latents.append(session.run(conds=given, steps=3).latents["edit"])
        assert not torch.allclose(*latents, atol=1e-4)


def test_the_readme_lists_every_shipped_model():
    for name, entry in registry.models().items():
        assert f"`{name}`" in README and entry["family"] in README


def test_the_readme_shows_the_layout_that_exists():
    listed = re.findall(r"^(\w[\w./]*/)", pages.sections(README)["Layout"], flags=re.M)
    assert listed and all((pages.ROOT / folder).is_dir() for folder in listed)


def test_pictures_are_small():
    pictures = list(pages.ROOT.glob("docs/**/*.png"))
    assert all(p.stat().st_size < 300_000 for p in pictures)
