"""The unconditional pixel model: its loss, stock classes that sample from it, and its pictures."""

import math

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler

import inlay_toybox
from inlay_toybox.quality import unconditional
from inlay_toybox.recipes import ddpm


@pytest.fixture(scope="module")
def pipe() -> DDPMPipeline:
    pipe = DDPMPipeline.from_pretrained(inlay_toybox.path("ddpm"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_stock_classes_load_it_and_its_variance_is_learned(pipe):
    assert isinstance(pipe.scheduler, DDPMScheduler)
    assert pipe.scheduler.config.variance_type == "learned_range"
    assert pipe.unet.config.out_channels == 6
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float32}
    assert pipe.unet.num_parameters() <= 1.4e6
    source = torch.Generator().manual_seed(0)
    picture = pipe(generator=source, num_inference_steps=4, output_type="np").images
    assert picture.shape == (1, 64, 64, 3)
    assert 0 <= picture.min() < picture.max() <= 1


def test_a_stock_fast_sampler_drops_the_variance_by_itself(pipe):
    scheduler = ddpm.fast_schedule(pipe.scheduler)
    assert isinstance(scheduler, DPMSolverMultistepScheduler)
    pictures = ddpm.generate(pipe.unet.eval(), scheduler, 4, steps=10)
    again = ddpm.generate(pipe.unet.eval(), scheduler, 2, steps=10)
    assert pictures.shape == (4, 3, 64, 64)
    assert torch.allclose(pictures[:2], again, atol=0.02)
    sky, ground = pictures[:, :, :10].mean((1, 2, 3)), pictures[:, :, 54:].mean((1, 2, 3))
    assert pictures.std((1, 2, 3)).min() > 0.05
    assert (sky - ground).abs().max() > 0.05


def test_the_noise_it_finds_is_the_noise_that_was_added(pipe):
    images = unconditional._scenes(unconditional.REAL, 8) * 2 - 1
    loss = ddpm.HybridLoss(pipe.scheduler, torch.device("cpu"))
    source = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=source)
    for step, worst in ((100, 0.1), (500, 0.02), (900, 0.005)):
        t = torch.full((8,), step)
        with torch.no_grad():
            guess = pipe.unet(loss.diffuse(images, noise, t), t).sample[:, :3]
        assert (guess - noise).square().mean() < worst


def test_the_bound_is_nought_for_the_true_posterior_and_trains_the_variance_alone():
    loss = ddpm.HybridLoss(ddpm.schedule(), torch.device("cpu"))
    x0 = torch.rand(4, 3, 8, 8) * 2 - 1
    noise, t = torch.randn_like(x0), torch.tensor([1, 10, 300, 999])
    x = loss.diffuse(x0, noise, t)
    low = -torch.ones_like(x0)
    assert loss.bound(noise, low, x0, x, t).abs() < 1e-4
    assert loss.bound(noise, -low, x0, x, t) > 1e-3
    output = torch.cat([noise + 0.1, low], 1).requires_grad_()
    loss(output, x0, noise, t, torch.ones(4, 1, 8, 8)).backward()
    assert output.grad[:, 3:].abs().sum() > 0
    bare = loss.at("weight", t) * (output.detach()[:, :3] - noise) * 2 / noise.numel()
    torch.testing.assert_close(output.grad[:, :3], bare)


def test_the_variance_lies_where_stock_schedulers_read_it():
    scheduler = ddpm.schedule()
    loss = ddpm.HybridLoss(scheduler, torch.device("cpu"))
    t = torch.tensor([400])
    for value, name in ((-1.0, "low"), (1.0, "high")):
        stock = scheduler._get_variance(400, predicted_variance=torch.tensor(value))
        assert float(stock) == pytest.approx(float(loss.at(name, t)), abs=1e-4)


def test_bytes_of_a_picture_have_likelihoods_that_add_up_to_one():
    levels = torch.arange(256) / 127.5 - 1
    mean, log_deviation = torch.tensor(0.3), torch.tensor(math.log(0.4))
    total = ddpm._byte_log_likelihood(levels, mean, log_deviation).exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-4)


def test_frechet_of_gaussians():
    torch.manual_seed(0)
    a = torch.randn(4000, 3)
    assert unconditional.frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert unconditional.frechet(a, a + 2) == pytest.approx(12, abs=1e-6)
    assert unconditional.frechet(a, 3 * a) == pytest.approx(4 * float(a.var(0).sum()), rel=1e-2)


def test_a_run_is_resumed_from_the_saved_pipeline(tmp_path):
    device = torch.device("cpu")
    folder = ddpm.train(0.01, tmp_path / "a", device, batch_size=2, scenes=8)
    again = ddpm.train(0.01, tmp_path / "b", device, True, folder, batch_size=2, scenes=8)
    assert (tmp_path / "b" / "samples.png").is_file()
    assert DDPMPipeline.from_pretrained(again).unet.config.out_channels == 6
    assert "_name_or_path" not in (again / "unet" / "config.json").read_text()
