"""`inlay-toybox report`: sizes, figures, grids and curves in a page written by hand."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import inlay_toybox
from inlay_toybox import report, sheets
from inlay_toybox.cli import main
from inlay_toybox.quality import Share, figures
from inlay_toybox.quality.figures import Subject

PAGE = """# Mine
<!-- models -->
old
<!-- /models -->
by hand
<!-- detector -->
<!-- /detector -->
"""


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page, a quick measurement that counts its calls, and an empty store of figures."""
    calls = []

    def measure(n):
        calls.append(n)
        return {"objects": Share(9, 10), "noise": 1 / 3}

    labels = {"objects": ("objects found", "0.97"), "noise": ("noise | left", "")}
    monkeypatch.setitem(figures.SUBJECTS, "detector", Subject(measure, labels))
    monkeypatch.setattr(figures, "KEPT", tmp_path / "kept")
    file = tmp_path / "page.md"
    file.write_text(PAGE)
    return file, calls


def test_the_page_gets_sizes_figures_and_pictures_and_keeps_its_prose(page):
    file, calls = page
    assert main(["report", "detector", "--n", "5", "--page", str(file)]) == 0
    text = file.read_text()
    assert text.startswith("# Mine\n")
    assert "\nby hand\n" in text
    assert "old" not in text
    assert "| objects found | 0.900 (9/10) | 0.97 |" in text
    assert "0.333" in text
    assert "| `toybox/flux` | 7." in text
    assert "| `toybox/detector` | 1.0" in text
    for kind in ("samples.webp", "loss.png"):
        assert f"](pictures/toybox-detector-{kind})" in text
        assert (file.parent / "pictures" / f"toybox-detector-{kind}").stat().st_size > 1000
    assert not list(file.parent.glob("*.partial"))
    assert main(["report", "detector", "--n", "5", "--page", str(file)]) == 0
    assert file.read_text() == text
    assert calls == [5]


def test_figures_are_measured_again_for_other_weights_or_numbers(page, monkeypatch, tmp_path):
    _, calls = page
    figures.figures("detector", 5)
    figures.figures("detector", 6)
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(figures, "folder", lambda name: tmp_path)
    figures.figures("detector", 5)
    assert calls == [5, 6, 5]


def test_weights_below_a_folder_are_counted(tmp_path):
    (tmp_path / "unet").mkdir()
    save_file({"w": torch.zeros(3, 5), "b": torch.zeros(())}, tmp_path / "unet/m.safetensors")
    save_file({"w": torch.zeros(7)}, tmp_path / "m.safetensors")
    assert report.size(tmp_path).parameters == 16 + 7
    assert inlay_toybox.path("sd") != figures.home("sd")  # whose shared part is not among its own
    assert not list(figures.home("sd").glob("vae/*"))


def test_every_model_has_figures_and_a_grid():
    names = {"vae", *inlay_toybox.MODELS}
    assert names <= set(figures.SUBJECTS)
    assert names <= set(sheets.SHEETS)


def test_mistakes_are_named(tmp_path, capsys):
    assert main(["report", "--page", str(tmp_path / "none.md")]) == 2
    assert "none.md" in capsys.readouterr().err
    (tmp_path / "bare.md").write_text("# nothing to fill\n")
    assert main(["report", "--page", str(tmp_path / "bare.md")]) == 2
    assert "<!-- models -->" in capsys.readouterr().err
    assert main(["quality", "sdd"]) == 2
    assert "there are: flux" in capsys.readouterr().err
