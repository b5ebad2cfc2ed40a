"""gamma: auto finds the number that balances, counts what it asks for, and says where it cannot."""

import pytest
import torch

from inlay import ConfigError
from models import flux, stable_diffusion, stable_diffusion_3
from test_addit import run, with_options


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_automatic_gamma_is_the_one_that_balances(family):
    """From its own step on the run is the one with that number; the search is counted."""
    pipe = {"flux": flux, "sd3": stable_diffusion_3}[family]()
    auto = {"step": 2, "start": 1.1, "low": 0.5, "high": 2.0, "balance": 1.0, "xtol": 1e-6}
    searched = with_options(weighted_attention={"gamma": "auto", "auto": auto})
    result = run(pipe, searched)
    found = result.board["scale:gamma"]
    assert 0.5 < found < 2.0
    knots = [[0, 1.1], [1, 1.1], [2, found]]
    given = run(pipe, with_options(weighted_attention={"gamma": knots}))
    torch.testing.assert_close(result.latents["edit"], given.latents["edit"])
    wide = with_options(weighted_attention={"gamma": "auto", "auto": auto | {"high": found - 0.1}})
    assert run(pipe, wide).board["scale:gamma"] == pytest.approx(found - 0.1)  # the nearer end


def test_automatic_gamma_needs_blocks_that_hold_the_prompt():
    with pytest.raises(ConfigError, match=r"weighted_attention\.gamma: no block of this model"):
        run(stable_diffusion(), with_options(weighted_attention={"gamma": "auto"}))
