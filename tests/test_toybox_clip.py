"""The two CLIPs: stock classes load them, they name unseen things, and one can guide."""

import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

import inlay_toybox
from inlay_toybox import world
from inlay_toybox.quality import contrastive
from inlay_toybox.recipes import clip, judge
from inlay_toybox.training import UNSEEN


def test_stock_classes_load_both_and_they_agree_with_our_reading_of_them():
    picture = Image.fromarray(world.render(world.views("cow", 1, UNSEEN)[0]).image)
    for name in ("clip", "judge"):
        folder = inlay_toybox.path(name)
        model, processor = (cls.from_pretrained(folder) for cls in (CLIPModel, CLIPProcessor))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert model.num_parameters() <= 0.9e6
        inputs = processor(
            text=["a cow", "a red bus"], images=picture, padding=True, return_tensors="pt"
        )
        with torch.no_grad():
            out = model(**inputs)
        assert out.logits_per_image.argmax() == 0
        ours = contrastive.Clip(model, processor)
        pixels = torch.from_numpy(world.render(world.views("cow", 1, UNSEEN)[0]).image)
        with torch.no_grad():
            seen = ours.see(pixels.permute(2, 0, 1)[None] / 255)
        assert F.cosine_similarity(seen, out.image_embeds).min() > 0.999


def test_both_name_what_they_never_saw():
    for name in ("clip", "judge"):
        shares = contrastive.zero_shot(3, clip=contrastive.Clip.load(inlay_toybox.path(name)))
        assert shares["classes"].value >= 0.95
        assert shares["captions"].value >= 0.95
        assert shares["degraded"].value >= 0.8
        assert shares["classes"].total + shares["held_out"].total == 96


def test_the_judge_is_another_model():
    ours, theirs = clip.GUIDE, judge.JUDGE
    for part in ("side", "patch", "width", "layers", "seed", "extended", "mirrored", "embedding"):
        assert getattr(ours, part) != getattr(theirs, part)
    assert theirs.first > ours.first + ours.scenes


def test_the_gradient_of_a_name_reaches_the_pixels_through_masks_and_warps():
    model = contrastive.Clip.load()
    x = torch.zeros(4, 3, 64, 64, requires_grad=True)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 16:48] = 1
    torch.manual_seed(0)
    seen = model.see(clip.extending()(x * mask) / 2 + 0.5)
    (seen @ model.read(["a red bus"]).T).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad[..., 16:48, 16:48].abs().amax((1, 2, 3)).min() > 0
    assert (x.grad * (1 - mask)).abs().max() == 0


def test_a_few_steps_along_the_gradient_turn_grey_into_what_is_named():
    model = contrastive.Clip.load()
    words = model.read(["a red balloon", "a cow"])
    x = torch.zeros(1, 3, 64, 64, requires_grad=True)
    before = (model.see(x / 2 + 0.5) @ words.T)[0]
    for _ in range(10):
        (slope,) = torch.autograd.grad((model.see(x / 2 + 0.5) @ words.T)[0, 0], x)
        x = (x + 0.1 * slope / slope.abs().max()).clamp(-1, 1).detach().requires_grad_()
    after = (model.see(x / 2 + 0.5) @ words.T)[0]
    assert after[0] - before[0] > 0.2
    assert after[0] > after[1]


def test_the_extending_augmentations_leave_some_pictures_alone_and_fill_with_grey():
    torch.manual_seed(0)
    images = torch.full((64, 3, 32, 32), 0.5)
    warped = clip.extending()(images)
    untouched = ((warped - 0.5).abs() < 1e-4).flatten(1).all(1)
    assert 0.15 < untouched.float().mean() < 0.5
    assert warped[~untouched].amin((1, 2, 3)).abs().max() < 1e-6
    assert warped.max() <= 0.5 + 1e-6


def test_nothing_true_counts_as_wrong():
    cow, cow_on_grass = clip.facts((thing("cow"),)), clip.facts((thing("cow"),), "grass")
    bus = clip.facts((thing("bus"),), "road")
    shown = torch.stack([cow_on_grass, cow_on_grass, bus])
    told = torch.stack([cow, cow_on_grass, bus])
    unit = F.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0]]), dim=-1)
    scale = torch.tensor(50.0)
    same_facts = clip.contrastive_loss(unit, unit, scale, shown, told)
    strict = F.cross_entropy(scale * unit @ unit.T, torch.arange(3))
    assert same_facts < strict
    wrong = clip.contrastive_loss(unit, unit[[2, 1, 0]], scale, shown, told)
    assert wrong > 10


def thing(name: str) -> world.Thing:
    return world.Thing(name, None, 0.5, 0.9, 0.4)


def test_a_step_holds_close_ups_masked_regions_and_whole_scenes(tmp_path):
    design = clip.Design(scenes=12, width=32, layers=1, text_width=32, text_layers=1)
    folder = clip.train(0.005, tmp_path, torch.device("cpu"), batch_size=16, design=design)
    assert CLIPModel.from_pretrained(folder).config.vision_config.hidden_size == 32
    assert (tmp_path / "samples.png").is_file()
    further = clip.train(
        0.006, tmp_path, torch.device("cpu"), True, folder, batch_size=16, design=design
    )
    assert further == folder
