"""The networks behind metrics: their names, how they see pictures, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

from inlay_bench import networks
from inlay_bench.metrics import clip
from inlay_config.errors import ModelError
from inlay_config.images import to_tensor
from inlay_toybox import quality, world


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random `CLIPModel` of 32 px with its tokenizer and processor."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(i) for i in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizerFast(
        vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16
    )
    size = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    size |= {"num_attention_heads": 2}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config=size
            | {
                "vocab_size": len(words),
                "max_position_embeddings": 16,
                "bos_token_id": 0,
                "eos_token_id": 1,
                "pad_token_id": 1,
            },
            vision_config=size | {"image_size": 32, "patch_size": 8},
            projection_dim=24,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return folder


def test_an_encoder_sees_and_reads_as_transformers_does(clip_folder: Path) -> None:
    encoder = networks.ClipEncoder.from_pretrained(clip_folder, "tiny")
    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor = CLIPImageProcessor.from_pretrained(clip_folder)
    ramp = np.linspace(0, 255, 40 * 61 * 3).reshape(61, 40, 3).astype(np.uint8)
    file = Image.fromarray(ramp).transpose(Image.Transpose.ROTATE_90)
    x = torch.tensor(np.asarray(file)).permute(2, 0, 1)[None] / 255
    seen = processor(file, return_tensors="pt").pixel_values
    ours = (encoder.prepare(x) - encoder.mean) / encoder.deviation
    torch.testing.assert_close(ours, seen, atol=0.02, rtol=0)  # bytes are rounded, ours are not
    exact = F.normalize(model.get_image_features(ours).pooler_output)
    torch.testing.assert_close(encoder.images(x), exact)
    sentences = ["a dog on a road", "a cat"]
    tokens = CLIPTokenizerFast.from_pretrained(clip_folder)(
        sentences, padding=True, truncation=True, return_tensors="pt"
    )
    read = F.normalize(model.get_text_features(**tokens).pooler_output)
    torch.testing.assert_close(encoder.texts(sentences), read)


def test_an_encoder_names_itself_and_lets_gradients_through(clip_folder: Path) -> None:
    encoder = networks.ClipEncoder.from_pretrained(clip_folder, "tiny")
    again = networks.ClipEncoder.from_pretrained(clip_folder)
    assert (encoder.name, encoder.side, again.name) == ("tiny", 32, str(clip_folder))
    assert encoder.digest == again.digest and len(encoder.digest) == 12
    with torch.no_grad():
        again.model.logit_scale += 1
    assert networks.digest_of(again.model) != encoder.digest
    x = torch.rand(1, 3, 40, 40, requires_grad=True)
    encoder.images(x)[:, 0].sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0
    assert not any(p.requires_grad for p in encoder.model.parameters())
    square = torch.rand(1, 3, 32, 32)
    assert torch.equal(encoder.prepare(square), square)
    for height, width in ((30, 41), (49, 31), (7, 100), (33, 33)):
        assert encoder.prepare(torch.rand(1, 3, height, width)).shape == (1, 3, 32, 32)


def test_the_judge_tells_captions_and_changes_apart() -> None:
    """The shipped one, over unseen scenes: insertions that succeeded, or did nothing."""
    judge, items = networks.judge(), list(quality.insertion_items(16, seed=3))
    before = torch.cat([to_tensor(item.picture) for item in items])
    drawn = [Image.fromarray(world.render(item.target).image) for item in items]
    after = torch.cat([to_tensor(picture) for picture in drawn])
    captions = [item.source_caption for item in items], [item.target_caption for item in items]
    right = clip.similarities(judge, before, after, *captions)
    nothing = clip.similarities(judge, before, before, *captions)
    assert (judge.name, judge.side) == ("toybox/judge", 80)
    assert (right.edited > nothing.edited).float().mean() >= 0.9
    assert right.direction.mean() > 0.5 and nothing.direction.abs().max() == 0


def test_what_is_no_encoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no CLIP model.*its tokenizer"):
        networks.ClipEncoder.from_pretrained(tmp_path)


def test_weights_that_do_not_fit_are_named(clip_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    projection = weights.pop("visual_projection.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"not whole: no visual_projection\.weight"):
        networks.ClipEncoder.from_pretrained(folder)
    weights["visual_projection.weight"] = projection[:5].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"clip: no CLIP model.*mismatch"):
        networks.ClipEncoder.from_pretrained(folder)


def test_weights_that_were_not_fetched_are_named(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="inlay models fetch lpips"):
        networks.lpips()
