"""The registry: listing without importing, importing by name, models that are safe to load."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

import inlay_toybox
from inlay_config import config, registry
from inlay_config.errors import ConfigError, ModelError, PluginError

SHIPPED = sorted(name for name, entry in registry.plugins().items() if entry["source"] == "inlay")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_entry_imports_and_describes_itself(name: str) -> None:
    entry = registry.plugins()[name]
    assert set(entry) == {"class", "summary", "needs", "tested", "maturity", "source"}
    assert entry["maturity"] in ("stable", "beta", "prototype") and entry["summary"]
    cls = registry.plugin_class(name)
    assert dataclasses.is_dataclass(cls.Config) and cls.__doc__


def test_every_plugin_runs_in_a_packaged_experiment() -> None:
    used = {name for each in config.experiments() for name in config.load(each).plugins}
    assert set(SHIPPED) <= used


def test_an_unknown_plugin_is_refused_with_a_suggestion() -> None:
    with pytest.raises(
        ConfigError,
        match=r"plugins\.latentblend: no plugin 'latentblend'\. Did you mean 'latent_blend'",
    ):
        registry.plugin_class("latentblend")


def test_listing_imports_neither_torch_nor_plugins() -> None:
    code = "import sys; from inlay_config import registry; registry.plugins(); registry.models()\n"
    code += "sys.exit(any(m in sys.modules for m in ('torch', 'inlay_plugins', 'inlay_toybox')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def points(monkeypatch: pytest.MonkeyPatch, *pairs: tuple[str, str]) -> None:
    found = EntryPoints(EntryPoint(name, value, "inlay") for name, value in pairs)
    monkeypatch.setattr(registry, "entry_points", lambda group: found)


def test_third_parties_are_listed_and_cannot_take_our_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points(monkeypatch, ("mine", "decimal:Decimal"), ("latent_blend", "os:system"))
    assert registry.plugins()["latent_blend"]["class"].startswith("inlay_plugins.")
    assert registry.plugins()["mine"]["class"] == "decimal:Decimal"
    assert registry.plugin_class("mine").__name__ == "Decimal"


def test_a_broken_third_party_is_named_when_used(monkeypatch: pytest.MonkeyPatch) -> None:
    points(monkeypatch, ("gone", "no_such_module:Thing"), ("half", "decimal:Nothing"))
    for name in ("gone", "half"):
        with pytest.raises(PluginError, match=f"plugin {name}: cannot be imported"):
            registry.plugin_class(name)


@pytest.mark.parametrize("name", ["flux", "toybox/flx", "/nowhere", "./nowhere", "../x/y", "a/b/c"])
def test_an_unknown_model_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=f"model: no model '{name}'"):
        registry.resolve_model(name)


def test_hub_names_and_folders_pass(tmp_path: Path) -> None:
    assert registry.resolve_model("black-forest-labs/FLUX.1-dev") == "black-forest-labs/FLUX.1-dev"
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").touch()
    assert registry.resolve_model(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("suffix", ["bin", "ckpt", "pt", "pth"])
def test_pickled_weights_are_refused(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / f"weights.{suffix}").touch()
    with pytest.raises(ModelError, match=r"unet' is not safetensors\. Convert"):
        registry.resolve_model(str(tmp_path))


def test_a_folder_without_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        registry.resolve_model(str(tmp_path))


def test_a_model_that_finds_no_room_in_the_cache_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path / "file"))
    inlay_toybox.path.cache_clear()
    with pytest.raises(ModelError, match=r"'toybox/sd' has no place: .*toybox.*set INLAY_CACHE"):
        registry.resolve_model("toybox/sd")
