"""`inlay run --trace-images`: a strip of chosen steps and a film of all of them."""

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import inlay
from inlay.cli.film import COLUMNS, Film, strip
from inlay.cli.main import app
from inlay_config.images import to_tensor
from models import conds, pixel, stable_diffusion


def roll(pipe, steps, **options):
    film = Film()
    given = {} if not hasattr(pipe, "vae") else conds(pooled=False)
    options = {"conds": given, "steps": steps, "seed": 3, "guidance": 1.0} | options
    result = inlay.Session(pipe).run(callback=film.update, **options)
    return film, result


@pytest.mark.parametrize(("make", "size"), [(stable_diffusion, 32), (pixel, 16)])
def test_every_step_is_a_frame(make, size, tmp_path):
    film, result = roll(make(), 15, size=size)
    assert [title for title, _ in film.frames] == [f"step {i}" for i in range(15)]
    film.save(tmp_path)
    with Image.open(tmp_path / "film.webp") as moving:
        assert moving.n_frames == 15
    assert (tmp_path / "film.png").is_file()
    clean = to_tensor(film.frames[-1][1]["x0"])  # where the last step ends
    torch.testing.assert_close(clean, result.images["edit"], rtol=0, atol=0.02)


def test_masks_part_the_estimate():
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    film, _ = roll(stable_diffusion(), 2, size=32, mask=mask)
    panels = film.frames[-1][1]
    assert list(panels) == ["x", "x0", "in user", "outside user"]
    inside, outside = (torch.tensor(list(panels[k].getdata())) for k in ("in user", "outside user"))
    whole = torch.tensor(list(panels["x0"].getdata()))
    assert (inside + outside - whole).abs().max() <= 1
    assert not inside.view(32, 32, 3)[:, 18:].any()


def test_a_strip_has_a_column_per_step():
    panel = Image.new("RGB", (64, 64), "#ff0000")
    one, two = (strip([("step", {"x": panel})] * n) for n in (1, 2))
    assert two.width > one.width
    assert two.height == one.height


def test_long_runs_show_evenly_chosen_steps(tmp_path):
    film, _ = roll(stable_diffusion(), 30, size=32)
    film.save(tmp_path)
    with Image.open(tmp_path / "film.png") as drawn, Image.open(tmp_path / "film.webp") as moving:
        assert moving.n_frames == 30
        assert drawn.width < 30 * 128 / 2 < COLUMNS * 200


def test_the_command_writes_both(tmp_path):
    words = ["run", "t2i", "steps=2", "--trace-images", "--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert {"film.png", "film.webp"} <= {p.name for p in (tmp_path / "out").iterdir()}
