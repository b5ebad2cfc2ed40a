"""Records survive kills at any moment, torn lines, full disks, second processes, new settings."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import bench_cases
from inlay_bench import pictures, records
from inlay_bench.pictures import digest_of
from inlay_bench.records import DiskError, Records
from inlay_config.errors import InputError
from inlay_config.images import open_image

IDENTITY = {"method": "test", "weights": "abc", "versions": {"inlay": "1"}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "test.jsonl"


def fill(path: Path, n: int) -> Records:
    book = Records(path, IDENTITY)
    for i in range(n):
        book.append({"item": f"{i:04d}", "state": "done", "numbers": {"x": i / 3}})
    return book


def test_records_come_back_as_they_were_written(path: Path) -> None:
    written = fill(path, 5).latest
    assert Records(path, IDENTITY).latest == written
    assert len(path.read_text().splitlines()) == 6


def test_a_torn_line_is_set_aside_and_its_item_done_again(path: Path) -> None:
    fill(path, 3)
    whole = path.read_bytes()
    for cut in range(1, 30, 7):
        path.write_bytes(whole[:-cut])
        book = Records(path, IDENTITY)
        assert set(book.latest) == {"0000", "0001"}
        book.append({"item": "0002", "state": "done", "numbers": {"x": 2 / 3}})
        assert path.read_bytes() == whole
    assert path.with_suffix(".torn").read_text().startswith('{"item": "0002"')


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"not json", "line 3 cannot be read"),
        (b"[1, 2]", "line 3 cannot be read"),
        (b'{"state": "done"}', "line 3 is not a record"),
        (b'{"item": "0001", "state": "odd", "attempt": 1}', "line 3 is not a record"),
        (b'{"item": "0000", "state": "done", "attempt": 2}', "line 3 repeats a record"),
    ],
)
def test_a_broken_line_is_named_and_nothing_is_touched(
    path: Path, line: bytes, problem: str
) -> None:
    fill(path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = line + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(InputError, match=problem):
        Records(path, IDENTITY)
    assert path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize("content", [b"", b"\n", b"\x00" * 64 + b"\n", b'{"other": 1}\n'])
def test_a_file_of_something_else_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"test\.jsonl: (this is no file|line 1)"):
        Records(path, IDENTITY)
    assert path.read_bytes() == content


def test_another_identity_is_refused_with_the_difference(path: Path) -> None:
    fill(path, 1)
    other = {"method": "test", "weights": "abd", "versions": {"inlay": "1", "torch": "2"}}
    with pytest.raises(InputError) as refused:
        Records(path, other)
    assert 'weights: "abc" -> "abd"' in str(refused.value)
    assert 'versions.torch: nothing -> "2"' in str(refused.value)
    assert "versions.inlay" not in str(refused.value)
    assert "--restart" in str(refused.value)


def test_other_networks_alone_ask_for_another_measurement(path: Path) -> None:
    Records(path, {"pictures": {"seed": 0}, "measures": {"networks": {"judge": "a"}}})
    with pytest.raises(InputError, match=r"measures\.networks\.judge: .*--remeasure"):
        Records(path, {"pictures": {"seed": 0}, "measures": {"networks": {"judge": "b"}}})


def test_failed_items_may_be_done_again_and_done_ones_may_not(path: Path) -> None:
    book = fill(path, 1)
    book.append({"item": "f", "state": "failed", "error": "no"})
    assert book.done("f") and not book.done("f", retry_failed=True)
    book.append({"item": "f", "state": "done", "numbers": {}})
    assert Records(path, IDENTITY).latest["f"]["attempt"] == 2
    with pytest.raises(ValueError, match="done already"):
        book.append({"item": "f", "state": "done"})


@pytest.mark.parametrize("written", [0, 7])
def test_a_full_disk_leaves_whole_records(
    path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    book = fill(path, 2)
    whole, write = path.read_bytes(), os.write

    def full(file: int, data: bytes) -> int:
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[:written])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DiskError, match="No space left on device"):
        book.append({"item": "0002", "state": "done"})
    monkeypatch.undo()
    assert path.read_bytes() == whole
    book.append({"item": "0002", "state": "done"})
    assert set(Records(path, IDENTITY).latest) == {"0000", "0001", "0002"}


def test_a_full_disk_ends_the_evaluation_and_it_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench_cases.evaluate(tmp_path, n=2)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(DiskError, match=r"0002\.png: cannot write there: No space left"):
        bench_cases.evaluate(tmp_path, n=4)
    monkeypatch.undo()
    done = bench_cases.evaluate(tmp_path, n=4)
    assert list(done.records["plain"]) == ["0000", "0001", "0002", "0003"]


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with records.locked(tmp_path):
        child = os.fork()
        if not child:
            try:
                with records.locked(tmp_path):
                    os._exit(1)
            except InputError as error:
                told = f"process {os.getppid()}" in str(error)
                os._exit(0 if told else 2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with records.locked(tmp_path):
        pass


def test_kills_at_any_moment_lose_and_repeat_nothing(tmp_path: Path) -> None:
    """SIGKILL after a random time, again and again, until all is done: the same records once."""
    n, kills, rng = 24, 0, random.Random(4)
    killed, plain = tmp_path / "killed", tmp_path / "plain"
    while True:
        child = os.fork()
        if not child:
            bench_cases.evaluate(killed, n=n, methods=("plain", "flaky"), pause=0.01)
            os._exit(0)
        time.sleep(rng.uniform(0.02, 0.2 + 0.02 * kills))
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        kills += 1
        assert kills < 500
    print(f"{kills} kills")
    assert kills >= 2
    bench_cases.evaluate(plain, n=n, methods=("plain", "flaky"))
    for method in ("plain", "flaky"):
        assert written(killed, method) == written(plain, method)
        for item in written(plain, method):
            if item["state"] == "done":
                paths = [pictures.path_of(f, method, item["item"]) for f in (killed, plain)]
                assert digest_of(open_image(paths[0])) == digest_of(open_image(paths[1]))


def written(folder: Path, method: str) -> list[dict[str, Any]]:
    """The records of a file, line by line, without the time they took."""
    lines = (folder / f"{method}.jsonl").read_text().splitlines()[1:]
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
