"""A benchmark's files: a local folder, or a data set of the Hugging Face hub by name."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from inlay_config.errors import ConfigError, InputError, PluginError
from inlay_config.images import open_image

BATCH = 16  # rows that are in memory at once
Row = dict[str, Any]


def root_of(data: str, name: str, patterns: Sequence[str]) -> Path:
    """The folder of a benchmark. A name `owner/set` that is no folder is fetched from the hub.

    patterns: the hub's files that are wanted. Raises ConfigError when no data was named, InputError
    when there is no such folder or data set.
    """
    where = f"benchmark {name}"
    if not data:
        fix = "Name a folder or a data set of the hub: --data WHERE."
        raise ConfigError("its files are not here", where=where, fix=fix)
    if Path(data).is_dir():
        return Path(data)
    if data.count("/") != 1 or data.startswith((".", "/", "~")):
        raise InputError(f"there is no folder '{data}'", where=where)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    problems = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)
    try:
        fetched = snapshot_download(data, repo_type="dataset", allow_patterns=list(patterns))
    except problems as error:
        reason = " ".join(str(error).split())[:200]
        fix = "Give a folder that has the files, or see to the network and the name."
        problem = f"'{data}' is no folder and cannot be fetched: {reason}"
        raise InputError(problem, where=where, fix=fix) from error
    return Path(fetched)


def rows(files: Sequence[Path], columns: Sequence[str]) -> Iterator[Row]:
    """Rows of Parquet files in order, these columns alone; pictures are `{bytes, path}`.

    Raises InputError for a file that cannot be read or lacks a column.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError as error:
        fix = "Install what it needs: pip install 'inlay[bench]'."
        raise PluginError("there is no pyarrow here", where=str(files[0]), fix=fix) from error
    for path in files:
        try:
            table = parquet.ParquetFile(path)
            if missing := [name for name in columns if name not in table.schema_arrow.names]:
                there = ", ".join(table.schema_arrow.names)
                problem = f"there is no column '{missing[0]}' (there are {there})"
                raise InputError(problem, where=str(path), fix="Is it another data set?")
            for batch in table.iter_batches(BATCH, columns=list(columns)):
                yield from batch.to_pylist()
        except (ArrowException, OSError) as error:
            raise InputError(f"cannot be read as Parquet: {error}", where=str(path)) from error


def parquet_files(root: Path, pattern: str, name: str) -> list[Path]:
    """Parquet files below a folder whose path fits. Raises InputError for none, telling what is
    there."""
    if found := sorted(root.rglob(pattern)):
        return found
    raise wrong_layout(root, name, pattern)


def wrong_layout(root: Path, name: str, wanted: str) -> InputError:
    there = sorted(p.name for p in root.iterdir())
    listed = ", ".join(there[:6]) + (", ..." if len(there) > 6 else "") if there else "nothing"
    fix = "docs/benchmarks.md shows the layout."
    return InputError(
        f"this is no {name}: no {wanted} (there is {listed})", where=str(root), fix=fix
    )


def read_json(path: Path, kind: type = dict) -> Any:
    """A JSON file of an object or a list. Raises InputError when it is not there or none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError("there is no such file", where=str(path)) from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read as JSON: {error}", where=str(path)) from error
    if not isinstance(content, kind):
        wanted = "an object" if kind is dict else "a list"
        raise InputError(f"must be {wanted}", where=str(path))
    return content


def values(entry: Any, keys: Sequence[str], where: str) -> list[Any]:
    """The values of an entry. Raises InputError for one that lacks a key."""
    if not isinstance(entry, Mapping):
        raise InputError("the entry is no object", where=where)
    if missing := [key for key in keys if entry.get(key) in (None, "")]:
        raise InputError(f"the entry has no '{missing[0]}'", where=where)
    return [entry[key] for key in keys]


def picture(held: Any, where: str) -> Image.Image:
    """A picture by path, or as a Parquet row holds it. Raises InputError, naming the item."""
    if isinstance(held, Path):
        return open_image(held, where)
    content = held.get("bytes") if isinstance(held, Mapping) else None
    if not content:
        raise InputError("its picture is missing", where=where)
    return open_image(io.BytesIO(content), where)  # type: ignore[arg-type]  # a file as well
