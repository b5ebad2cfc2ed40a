"""The folder a run writes to: tried before the run, filled only when the run has ended well."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inlay_config.errors import InputError
from inlay_config.images import safe_join

# In the order in which they appear: a manifest says that all the rest is there.
CONTENTS = ("images", "masks", "sheet.png", "profile.md", "manifest.json", "film.png", "film.webp")


def resolve(name: str) -> Path:
    """The folder as given when absolute; a relative one may not climb out of the current folder."""
    return Path(name) if Path(name).is_absolute() else safe_join(Path(), name)


def check(folder: Path) -> None:
    """Raise InputError unless files can be made in `folder`; leaves nothing behind."""
    with staged(folder):
        pass


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A hidden folder inside `folder`, published when the block ends, removed when it raises."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))
    except OSError as error:
        fix = "Choose another folder with --out."
        raise InputError(
            f"cannot write there: {error.strerror}", where=f"out {folder}", fix=fix
        ) from error
    try:
        yield stage
        made = [name for name in CONTENTS if (stage / name).exists()]
        for name in CONTENTS if made else ():
            _remove(folder / name)
        for name in made:
            (stage / name).rename(folder / name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        for path in missing:
            if path.exists() and not any(path.iterdir()):
                path.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
