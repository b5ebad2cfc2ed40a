"""The wheel: everything a newcomer needs is inside, and it works from an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the tree and unpacked, as an installer would."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run([*build, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def python(site: Path, folder: Path, code: str) -> str:
    """Run code in an empty folder against the unpacked wheel -> stdout."""
    environment = os.environ | {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_wheel_holds_data_and_licences(site: Path) -> None:
    for name in (
        "inlay_config/registry.yaml",
        "inlay_config/experiments/addit.yaml",
        "inlay/loop.py",
    ):
        assert (site / name).is_file()
    experiments = {p.relative_to(ROOT / "experiments") for p in ROOT.glob("experiments/**/*.yaml")}
    shipped = site / "inlay_config" / "experiments"
    assert {p.relative_to(shipped) for p in shipped.rglob("*.yaml")} == experiments
    for model in ("flux/vae", "sd/unet", "mimicbrush/unet"):
        assert (site / f"inlay_toybox/models/{model}/config.json").is_file()
    (info,) = site.glob("inlay-*.dist-info")
    assert {p.name for p in (info / "licenses").iterdir()} == {"LICENSE", "NOTICE"}
    scripts = (info / "entry_points.txt").read_text()
    assert "inlay = inlay.cli.main:main" in scripts
    assert "inlay-toybox = inlay_toybox.cli:main" in scripts
    assert "eval = inlay_bench.cli:evaluate" in scripts
    assert (site / "inlay_bench" / "tasks" / "toybox-affordance.yaml").is_file()
    assert (site / "inlay_bench" / "study" / "page.html").is_file()
    packages = {p.name for p in site.iterdir() if p.is_dir()} - {info.name}
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert packages == {Path(name).name for name in listed["targets"]["wheel"]["packages"]}
    assert {"inlay", "inlay_config", "inlay_plugins", "inlay_toybox", "inlay_bench"} <= packages


def test_the_wheel_works_in_an_empty_folder(site: Path, tmp_path: Path) -> None:
    code = "import inlay; print(inlay.__file__)"
    assert Path(python(site, tmp_path, code)).is_relative_to(site)
    code = "from inlay_config import config; print(list(config.load('addit', ['seed=3']).plugins))"
    assert "weighted_attention" in python(site, tmp_path, code)
    code = (
        "from inlay_config import registry; print(registry.plugin_class('latent_blend').__name__)"
    )
    assert python(site, tmp_path, code) == "LatentBlend"
    code = "from inlay_config import registry; print(registry.resolve_model('toybox/flux'))"
    assert Path(python(site, tmp_path, code)).is_relative_to(site)
    assert list(tmp_path.iterdir()) == []
