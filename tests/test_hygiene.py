"""Rules the tree keeps: small core, short files, a tree that travels, names that never appear."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LISTED = subprocess.run(
    ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.split("\0")
TRACKED = [ROOT / name for name in LISTED if name and (ROOT / name).is_file()]
PYTHON = [path for path in TRACKED if path.suffix == ".py"]
TEXT = [
    path
    for path in TRACKED
    if path.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".sh", ""} and path.name != "LICENSE"
]
MIB = 1 << 20

BANNED = {
    r"\binference" r"_mode\b": "it would break gradients through the model",
    r"\bpickle\.loads?\b|\btorch\.load\((?!.*\bweights_only=True\b)": "nothing is unpickled",
    r"trust_remote_code\s*=\s*True": "no remote code",
    r"raise NotImplemented" r"Error": "no stubs",
    r"\b(TODO|FIX" r"ME|XXX)\b": "nothing is left undone",
    r"(?<![\w.\"'/])/(home|root|work)/\w": "no path of one machine",
    r"\b(eval|exec)\(": "no code from data",
}


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_core_stays_small() -> None:
    core = ROOT / "core" / "inlay"
    counted = {p.name: lines(p) for p in sorted(core.glob("*.py"))}
    print(sum(counted.values()), counted)
    assert sum(counted.values()) < 1500, counted
    attention = {p.name: lines(p) for p in (ROOT / "core" / "inlay_attention").glob("*.py")}
    assert sum(attention.values()) <= 1150, attention
    families = {p.name: lines(p) for p in (core / "backbones").glob("*.py")}
    assert all(count <= 200 for count in families.values()), families


def test_files_stay_short() -> None:
    long = {str(p.relative_to(ROOT)): lines(p) for p in PYTHON if lines(p) > 550}
    assert not long


def test_the_tracked_tree_travels() -> None:
    sizes = {path: path.stat().st_size for path in TRACKED}  # where links do not travel, as files
    assert sum(sizes.values()) < 56 * MIB
    assert not [path for path, size in sizes.items() if size > 15 * MIB], "shard weights"
    goldens = [size for path, size in sizes.items() if ROOT / "tests" / "goldens" in path.parents]
    assert sum(goldens) < 14 * MIB


@pytest.mark.parametrize("pattern", BANNED)
def test_banned_names_do_not_appear(pattern: str) -> None:
    files = PYTHON if "work" not in pattern else TEXT
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line) and ".eval()" not in line
    ]
    assert not found, BANNED[pattern]


def test_no_module_is_called_utils() -> None:
    assert not [path for path in PYTHON if re.search(r"util|helper|misc|common", path.stem)]


def test_every_module_and_test_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in PYTHON
        if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text("utf-8")))
    ]
    assert not silent


def test_weights_are_safetensors() -> None:
    pickles = {".bin", ".ckpt", ".pt", ".pth", ".pkl", ".npy"}
    assert not [path for path in TRACKED if path.suffix in pickles]


def test_constraints_pin_every_requirement() -> None:
    pins = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [item for group in (project["dependencies"], *extras) for item in group]
    names = {re.split(r"[<>=!~;\[ ]", item)[0].lower() for item in wanted} - {project["name"]}
    assert names <= pins
    assert not re.search(r"://|@|file:", (ROOT / "constraints.txt").read_text())
