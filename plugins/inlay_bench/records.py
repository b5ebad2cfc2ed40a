"""Records of an evaluation: one JSON line per item and method, kept through kills and full disks.

`METHOD.jsonl` begins with the identity of what was measured: the resolved configuration, versions,
weights, task and networks. A record is one `write` and one `fsync`, so it is there or it is not: a
line that a kill has torn is set aside in `METHOD.torn` and its item is done again. A file whose
identity differs is refused with the difference, two processes never write to one folder.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from inlay_config.errors import InputError
from inlay_config.images import whole

FORMAT = 1
Record = dict[str, Any]
"""item: its id. state: "done" or "failed". attempt: from 1. input: digest of its picture. seconds:
of the method. numbers: by column, null where one does not apply. error: of a failed item."""


class DiskError(InputError):
    """The disk is full or cannot be written to."""


class OtherIdentity(InputError):
    """Records that are there are of something else."""


class Records:
    """The records of one method. `latest` holds the last record of every item, in file order."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Open or begin `path`. Raises InputError for another identity, and for a file that is not
        what was written."""
        self.path, self.latest = path, dict[str, Record]()
        if path.exists():
            self._read(identity)
        else:
            header = {"inlay_records": FORMAT, "identity": identity}
            with on_disk(path), whole(path) as partial:
                partial.write_bytes(_line(header))

    def done(self, item: str, retry_failed: bool = False) -> bool:
        """Whether nothing is left to do for an item."""
        record = self.latest.get(item)
        return record is not None and not (retry_failed and record["state"] == "failed")

    def append(self, record: Record) -> None:
        """Write one record, whole or not at all. Raises DiskError when there is no room."""
        before = self.latest.get(record["item"])
        if before and before["state"] == "done":
            raise ValueError(f"{record['item']} is done already")
        record = {**record, "attempt": before["attempt"] + 1 if before else 1}
        with on_disk(self.path):
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            size = os.fstat(file).st_size
            try:
                line = _line(record)
                if os.write(file, line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file)
            except OSError:
                os.ftruncate(file, size)
                raise
            finally:
                os.close(file)
        self.latest[record["item"]] = record

    def _read(self, identity: Mapping[str, Any]) -> None:
        self._set_torn_line_aside()
        lines = self.path.read_bytes().splitlines()
        header = self._parse(lines[0], 1) if lines else {}
        if header.get("inlay_records") != FORMAT or "identity" not in header:
            fix = "Choose another --out, or give --restart to set what is there aside."
            raise InputError("this is no file of records", where=str(self.path), fix=fix)
        if changed := difference(header["identity"], json.loads(_line(identity))):
            problem = "these records are of something else: " + "; ".join(changed)
            fix = "Choose another --out, or give --restart to set what is there aside."
            if all(line.startswith("measures.") for line in changed):
                fix = "Give --remeasure to measure its pictures again, or choose another --out."
            raise OtherIdentity(problem, where=str(self.path), fix=fix)
        for number, text in enumerate(lines[1:], 2):
            record = self._parse(text, number)
            before = self.latest.get(record.get("item", ""))
            expected = before["attempt"] + 1 if before else 1
            repeated = before is not None and before["state"] == "done"
            if repeated or not _whole_record(record) or record["attempt"] != expected:
                self._refuse(number, "repeats a record" if repeated else "is not a record")
            self.latest[record["item"]] = record

    def _parse(self, text: bytes, number: int) -> Record:
        try:
            record = json.loads(text)
            if isinstance(record, dict):
                return record
        except ValueError:
            pass
        return self._refuse(number, "cannot be read")

    def _refuse(self, number: int, problem: str) -> Record:
        fix = "Delete that line (its item is done again), or give --restart to set all aside."
        raise InputError(f"line {number} {problem}", where=str(self.path), fix=fix)

    def _set_torn_line_aside(self) -> None:
        """What follows the last line end was cut off by a kill: keep it, but not as a record."""
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            with self.path.with_suffix(".torn").open("ab") as torn:
                torn.write(content[end:] + b"\n")
            os.truncate(self.path, end)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of `folder`; the lock goes with the process, however it ends."""
    with on_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            fix = "Wait for it, or choose another --out."
            owner = os.read(file, 20).decode(errors="replace")
            problem = f"another evaluation (process {owner}) is writing there"
            raise InputError(problem, where=f"out {folder}", fix=fix) from error
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(file)


def set_aside(folder: Path, beside: Collection[str] = ()) -> None:
    """Move what an evaluation left in `folder`, but for `beside`, to `folder/replaced-N`."""
    stays = (".lock", *beside)
    mine = [p for p in folder.iterdir() if p.name not in stays and not p.match("replaced-*")]
    with on_disk(folder):
        count = 1
        while (old := folder / f"replaced-{count}").exists():
            count += 1
        for path in mine:
            old.mkdir(exist_ok=True)
            path.rename(old / path.name)


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """What differs between two identities, as `key: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        inner = (difference(old.get(k), new.get(k), f"{path}.{k}" if path else k) for k in keys)
        return [line for lines in inner for line in lines]
    return [] if old == new else [f"{path}: {_brief(old)} -> {_brief(new)}"]


def _brief(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _whole_record(record: Record) -> bool:
    kinds = {"item": str, "state": str, "attempt": int}
    typed = all(isinstance(record.get(key), kind) for key, kind in kinds.items())
    return typed and record["state"] in ("done", "failed")


@contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """A full or unwritable disk as an error for people."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        fix = "Free some space or choose another --out; what is recorded stays, go on any time."
        raise DiskError(f"cannot write there: {reason}", where=str(path), fix=fix) from error
