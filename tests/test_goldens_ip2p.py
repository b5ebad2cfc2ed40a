"""InstructPix2Pix against stored numbers of the published code (tests/goldens/README.md)."""

import json
from pathlib import Path

import torch
from diffusers import EulerAncestralDiscreteScheduler
from diffusers.schedulers import scheduling_euler_ancestral_discrete as ancestral
from safetensors.torch import load_file

import inlay
from models import conds, instruct_pix2pix
from spies import plugin

GOLDENS = Path(__file__).parent / "goldens"


def test_the_published_run_step_by_step(monkeypatch):
    """The U-Net answers with the stored rows, if it is asked what it was asked there: the noisy
    latent at the step's level, the picture unscaled behind it, and zeros in the last row."""
    stored = load_file(GOLDENS / "ip2p_run.safetensors")
    card = json.loads((GOLDENS / "ip2p_run.json").read_text())
    pipe, seen, states = instruct_pix2pix(), [], []
    pipe.scheduler = EulerAncestralDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )

    def unet(sample, timestep, encoder_hidden_states, **_):
        i = min(len(seen), len(stored["eps_rows"]) - 1)  # later answers are not looked at
        seen.append((sample, timestep))
        return (stored["eps_rows"][i],)

    noise = iter([*stored["noise_steps"], *[torch.zeros(1, 4, 10, 14)] * card["steps"]])
    monkeypatch.setattr(ancestral, "randn_tensor", lambda *_, **__: next(noise))
    pipe.unet.forward = unet
    watch = plugin(pre_step=lambda step: states.append(step.x["edit"]))
    options = {"image_scale": card["cfg_image"]}
    session = inlay.Session(pipe, {"instruct": options, "watch": watch})
    session.backbone.picture = lambda image: stored["z_image"]
    session.run(
        image=torch.rand(1, 3, 20, 28),
        size=(20, 28),
        steps=card["steps"],
        guidance=card["cfg_text"],
        conds=conds(pooled=False),
        noise={"edit": stored["noise_init"]},
    )
    close = {"rtol": 0, "atol": 5e-4}  # diffusers' own table of sigmas
    for i, state in enumerate(stored["z_before"]):
        torch.testing.assert_close(states[i], state, **close)
    for i, t in enumerate(stored["t_model"]):
        (sample, at), picture = seen[i], stored["z_image"].repeat(3, 1, 1, 1)
        picture[2] = 0
        torch.testing.assert_close(at.float(), t, rtol=1e-6, atol=1e-3)
        scaled = stored["z_before"][i] / (stored["sigmas"][i] ** 2 + 1).sqrt()
        torch.testing.assert_close(sample[:, :4], scaled.repeat(3, 1, 1, 1), **close)
        assert torch.equal(sample[:, 4:], picture)
