"""Verbs that other packages bring: found, lazy, never in the way of ours; `inlay models fetch`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from inlay.cli import verbs
from inlay_config import registry
from shell import Invoke


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Entry points as if packages had brought them, and a module `verbs_of_others` to import."""
    code = '''
import typer
app = typer.Typer(help="Several verbs.")
@app.command()
def one(): typer.echo("one")
@app.command()
def two(): typer.echo("two")
def hello(name: str, loud: bool = False):
    """Say hello."""
    typer.echo(name.upper() if loud else name)
'''
    (tmp_path / "verbs_of_others.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)

    def points(**values: str) -> None:
        found = [EntryPoint(name, value, "inlay.verbs") for name, value in values.items()]
        monkeypatch.setattr(verbs, "entry_points", lambda group: found)

    return points


def test_a_verb_is_a_function_or_an_app(invoke: Invoke, install: Callable[..., None]) -> None:
    install(hello="verbs_of_others:hello", several="verbs_of_others:app")
    assert invoke("hello", "you", "--loud") == (0, "YOU\n", "")
    assert invoke("several", "two") == (0, "two\n", "")
    code, out, _ = invoke("--help")
    assert code == 0 and "Say hello." in out and "Several verbs." in out
    assert invoke("hello")[0] == 2


def test_nobody_takes_a_verb_of_ours(invoke: Invoke, install: Callable[..., None]) -> None:
    install(models="verbs_of_others:hello")
    assert "toybox/flux" in invoke("models")[1]


@pytest.mark.parametrize("value", ["not_installed:verb", "verbs_of_others:gone"])
def test_a_broken_verb_is_named_and_others_work(
    invoke: Invoke, install: Callable[..., None], value: str
) -> None:
    install(broken=value, hello="verbs_of_others:hello")
    code, out, _ = invoke("--help")
    assert code == 0 and "(cannot be loaded; reinstall its package)" in " ".join(out.split())
    code, _, err = invoke("broken", "--any", "option")
    assert code == 2 and f"verb broken ({value})" in err and "Traceback" not in err
    assert invoke("hello", "you")[0] == 0


def test_a_verb_is_imported_only_when_it_is_used(
    invoke: Invoke, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "verbs_of_others", raising=False)
    install(hello="verbs_of_others:hello")
    assert invoke("models", "--json")[0] == 0
    assert "verbs_of_others" not in sys.modules


def test_models_lists_and_fetches(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert json.loads(invoke("models", "--json")[1]) == registry.models()
    code, out, _ = invoke("models", "fetch")
    assert code == 0 and "lpips" in out and "fid" in out
    code, _, err = invoke("models", "fetch", "lpip")
    assert code == 2 and "Did you mean 'lpips'?" in err
    from inlay_bench import fetch

    monkeypatch.setattr(fetch, "fetch_lpips", lambda: tmp_path / "lpips.safetensors")
    code, out, _ = invoke("models", "fetch", "lpips", "--json")
    assert code == 0 and json.loads(out)["path"] == str(tmp_path / "lpips.safetensors")


def test_every_download_says_what_it_is() -> None:
    for name, entry in registry.downloads().items():
        assert entry["function"].startswith("inlay_bench.fetch:") and entry["summary"], name
        assert entry["licence"]
