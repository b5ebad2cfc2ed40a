"""What several files of tests share. Random examples are the same in every run: what fails once
fails again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import settings

from shell import Invoke

settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")


@pytest.fixture
def invoke(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Invoke:
    """Run `inlay WORDS...` in an empty folder -> exit code, stdout, stderr."""
    from inlay.cli import main as cli

    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["inlay", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        written = capfd.readouterr()
        return int(ended.value.code or 0), written.out, written.err

    return call


@pytest.fixture(scope="module")
def shown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of the exemplar that a module calls SHOWN."""
    request.module.SHOWN.save(path := tmp_path_factory.mktemp("exemplar") / "exemplar.png")
    return str(path)
