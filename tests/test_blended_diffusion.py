"""Blended Diffusion: its losses, its steps and whole runs of it against stored numbers."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler

import toys
from inlay import Frame, Result, Session, Step
from inlay_config import images
from inlay_config.config import Gradient
from inlay_plugins import clips, views
from inlay_plugins.background_loss import BackgroundLoss
from inlay_plugins.clip_guidance import ClipGuidance
from inlay_plugins.extending_augmentations import ExtendingAugmentations
from inlay_plugins.range_loss import RangeLoss
from inlay_plugins.rank import Rank
from spies import plugin

STORED, CARD = toys.golden("bd_step")
RUNS, RUN_CARD = toys.golden("bd_run")


def guidance(clip=None, **options) -> ClipGuidance:
    made = ClipGuidance(ClipGuidance.Config(**options), "clip_guidance", [clip or toy_clip()])
    made.texts, made.files = {"as stored": 1.0}, {}
    return made


def toy_clip() -> clips.Clip:
    return toys.clip(STORED, CARD["config"]["clip_size"])


def background(**options) -> BackgroundLoss:
    config = BackgroundLoss.Config(mode="reference", **options)
    return BackgroundLoss(config, "background_loss", toys.perceptual(STORED))


def stored_run(**board) -> SimpleNamespace:
    """What a plugin sees of a run on 24 pixels."""
    board = {"mask:user": STORED["mask"], "latent:source": STORED["init"]} | board
    backbone = SimpleNamespace(pixels=lambda x, size: x)
    return SimpleNamespace(
        board=board, backbone=backbone, size=(24, 24), device=torch.device("cpu"),
        rng=lambda *names: torch.Generator().manual_seed(0),
    )  # fmt: skip


def step_at(x: torch.Tensor, name: str) -> Step:
    """A step at the level of a stored one, its model called."""
    i = int(STORED[f"{name}.t_index"])
    alpha = STORED["alphas_cumprod"][i].float().sqrt()
    frame = Frame(alpha, (1 - alpha**2).sqrt(), "vp", "epsilon")
    model = toys.ToyADM(STORED["adm_M"], STORED["adm_mu0"], 24)
    t = STORED["timestep_map"][i]
    step = Step("edit", 0, 0, 12, t, True, ("edit",), lambda at: frame, {"edit": x})
    step.output["edit"] = model(x, t)[0]
    return step


def augmented(name: str):
    """An Augment of the warps that are stored of a step."""
    extending = ExtendingAugmentations(ExtendingAugmentations.Config(mode="reference"))
    warps = [STORED[f"{name}.aug_{kind}"] for kind in ("affine", "perspective")]
    applied = torch.stack(
        [STORED[f"{name}.aug_{kind}_applied"] for kind in ("affine", "perspective")]
    )

    def augment(pictures, mask, side, rng):
        seen = F.adaptive_avg_pool2d(pictures * mask, side)
        copies = extending.warp(seen.repeat(CARD["aug_num"] - 1, 1, 1, 1), *warps, applied)
        return torch.cat([seen, copies])

    return augment


@pytest.mark.parametrize("name", ["s0", "s1"])
def test_the_losses_and_the_gradient_of_published_steps(name):
    """One in the middle of a run and the last one, with random augmentations."""
    x = STORED[f"{name}.x_t"].clone().requires_grad_()
    step, run = step_at(x, name), stored_run(**{"augment:clip": augmented(name)})
    plugins = {"loss_clip": guidance(), "loss_range": RangeLoss(), "background": background()}
    losses = {}
    for key, one in plugins.items():
        if key != "loss_range":
            one.inlay_prepare(run)
        if key == "loss_clip":
            one.inlay_begin(run, "edit", {})
        losses[key] = one.inlay_objective(run, step, "edit").sum()
    (slope,) = torch.autograd.grad(sum(losses.values()), x)
    tolerance = CARD["tolerance_max_abs"]
    for key in ("loss_clip", "loss_range"):
        assert (losses[key] - STORED[f"{name}.{key}"]).abs() < tolerance["loss_*"]
    assert (-slope - STORED[f"{name}.g"]).abs().max() < tolerance["g"]
    assert (step.x0["edit"] - STORED[f"{name}.x0hat"]).abs().max() < 1e-5
    seen = views.view(run, step, "edit", "blended") * STORED["mask"]
    assert (seen - STORED[f"{name}.masked_input"]).abs().max() < 1e-5
    if name == "s0":
        copies = augmented(name)(seen, torch.ones(1), 21, None)
        assert (copies - STORED["s0.aug_out"]).abs().max() < tolerance["aug_out"]


class Respaced(torch.nn.Module):
    """The toy model, called with the index of a respaced step."""

    def __init__(self):
        super().__init__()
        self.model = toys.ToyADM(STORED["adm_M"], STORED["adm_mu0"], 24)
        self.config = self.model.config

    def forward(self, sample, timestep, return_dict=False):
        return self.model(sample, STORED["timestep_map"][int(timestep)])


def published(name: str, monkeypatch) -> tuple[list[torch.Tensor], Result]:
    """A run as published, from its seed: x after each step, and the result."""
    seed = torch.Generator().manual_seed(RUN_CARD["seed"])
    blends, shape = name != "alg1", (2, 3, 24, 24)
    noise, drawn = {"edit": torch.randn(shape, generator=seed)}, []
    for i in range(2, 12):
        drawn.append(torch.randn(shape, generator=seed))
        if blends:
            noise[f"latent_blend/{i}"] = torch.randn((1, *shape[1:]), generator=seed)
    draws = iter(drawn)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(draws)
    )
    cumulative = STORED["alphas_cumprod"]
    betas = 1 - cumulative / torch.cat([torch.ones(1, dtype=torch.float64), cumulative[:-1]])
    levels = {"num_train_timesteps": 12, "trained_betas": betas.tolist(), "clip_sample": False}
    if name == "ddim":
        scheduler = DDIMScheduler(**levels)
    else:
        scheduler = DDPMScheduler(**levels, variance_type="learned_range")
    pipe = toys.pixel_pipe(STORED, scheduler)
    pipe.unet = Respaced()
    states = []
    plugins = {
        "source_trajectory": {},
        "structure_transfer": {"step": 2},
        "extending_augmentations": ExtendingAugmentations(
            ExtendingAugmentations.Config(copies=2, affine=0.0, perspective=0.0)
        ),
        "clip_guidance": guidance(),
        "range_loss": RangeLoss(),
    }
    if blends:
        blend = {"steps": [[2, 11]], "noise": "shared", "level": "current", "mask": "mask:user"}
        plugins |= {"latent_blend": blend}
        plugins |= {"paste_back": {"mask": "mask:user", "feather": 0}}
    else:
        plugins |= {"background_loss": background()}
    config = Rank.Config(mode="reference", antialias=False)
    plugins |= {"rank": Rank(config, "rank", [toy_clip()])}
    plugins |= {"watch": plugin(observe=lambda step: states.append(step.x_next["edit"]))}
    session = Session(
        pipe,
        plugins,
        gradient=Gradient(apply="x0" if name == "ddim" else "mean", alpha_min=0.0),
    )
    result = session.run(
        "as stored", STORED["init"] / 2 + 0.5, STORED["mask"], steps=12, n=2, size=24, noise=noise
    )
    return states, result


@pytest.mark.parametrize("name", ["ddpm", "alg1", "ddim"])
def test_whole_published_runs_from_their_seed(name, monkeypatch):
    """Algorithm 2 with DDPM and with DDIM, and Algorithm 1; candidates come ranked.

    After DDPM's last step, whose variance is 0, the published code still moves the mean, by the
    variance of the step before; it shows the clean estimate of that step, as ours does.
    """
    states, result = published(name, monkeypatch)
    tolerance = RUN_CARD["tolerance_max_abs"]
    stored = RUNS[f"{name}.{'before' if name == 'alg1' else 'after'}"]
    for j, i in enumerate(RUN_CARD["stored_steps"][: 3 if name == "ddim" else 2]):
        off = (states[i] - stored[j]).abs().max()
        assert off < tolerance["free-running after/before"], (name, i, off)
    distances = RUNS[f"{name}.rank_distance"]
    order = result.board["rank:order"]
    assert torch.equal(order, distances.argsort())
    final = RUNS[f"{name}.final01"][order]
    assert (result.images["edit"] - final).abs().max() < tolerance["final01"]
    off = (result.board["rank:scores"] - distances.sort().values).abs().max()
    assert off < tolerance["rank_distance"]


def test_a_picture_is_squashed_by_lanczos_as_published():
    picture = images.to_pil(RUNS["source_u8"].permute(2, 0, 1)[None] / 255)[0]
    board = images.on_board({"image": picture}, (24, 24), "cpu")
    torch.testing.assert_close(board["image:source"] * 2 - 1, STORED["init"])
