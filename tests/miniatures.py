"""Miniature folders in the layouts of published benchmarks."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

EMU_TEXTS = ("idx", "task", "split", "instruction", "input_caption", "output_caption", "hash")


def scene(shade: int = 0, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A smooth picture: red grows to the right, green downwards, blue is the shade."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    return Image.fromarray(np.stack([x, y, np.full_like(x, shade)], -1).astype(np.uint8))


def held(picture: Image.Image) -> dict[str, Any]:
    """A picture as data sets of the hub hold it in Parquet."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": "picture.png"}


def save_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(list(map(dict, rows))), path)
    return path


def emu_edit(root: Path, split: str = "validation") -> Path:
    """Eight items in two files: four to add something that can be used (0, 1, 6, 7 less one of a
    wrong class), one with equal captions, three with a placeholder."""
    captions = [
        ("A dog on a beach.", "A dog with a red hat on a beach."),
        ("a quiet lake", "a quiet lake with a canoe"),
        ("a train station in city", "a train station in city at noon"),
        ("a train station in city", "a train station in city at noon"),
        ("a train station in city", "a train station in city at noon"),
        ("a cat", "a cat"),
        ("a road", "a road and a bicycle"),
        ("a table", "a wooden table"),
    ]
    rows = [
        {
            "idx": i,
            "task": "add" if i < 7 else "local",
            "split": split,
            "instruction": f"instruction {i}",
            "input_caption": before,
            "output_caption": after,
            "hash": f"{i:032x}",
            "image": held(scene(20 * i)),
        }
        for i, (before, after) in enumerate(captions)
    ]
    for part, some in enumerate((rows[:5], rows[5:])):
        save_rows(root / "data" / f"{split}-{part:05d}-of-00002.parquet", some)
    return root


def magicbrush(root: Path) -> Path:
    """Two sessions, of two turns and of one."""
    sessions = {"139": 2, "30": 1}
    turns, said = {}, {}
    for number, count in sessions.items():
        names = [f"{number}-input.png", *(f"{number}-output{i}.png" for i in range(1, count + 1))]
        for i, name in enumerate(names):
            (root / "images" / number).mkdir(parents=True, exist_ok=True)
            scene(40 * i, (64, 64)).save(root / "images" / number / name)
        turns[number] = [
            {"input": a, "mask": f"{number}-mask{i}.png", "output": b, "instruction": f"turn {i}"}
            for i, (a, b) in enumerate(pairwise(names), 1)
        ]
        said[number] = {
            name: " with ".join(["a room", "a lamp", "a cat"][: i + 1])
            for i, name in enumerate(names)
        }
    local = {"139": {"139-output1.png": "a lamp", "139-output2.png": "a cat"}}
    for name, content in (
        ("edit_sessions", turns),
        ("global_descriptions", said),
        ("local_descriptions", local),
    ):
        (root / f"{name}.json").write_text(json.dumps(content))
    return root


def pie_bench(root: Path) -> Path:
    """Three entries: two of type 2 and one of type 0; the region of the first is a rectangle."""
    left, top, right, bottom = 128, 256, 384, 448
    rectangle = [n for row in range(top, bottom) for n in (row * 512 + left, right - left)]
    entries = {
        "211000000000": ("2", "a [] table", "a table with [a blue cup]", rectangle),
        "000000000000": ("0", "a bicycle", "a [rusty] bicycle", [0, 512 * 512]),
        "211000000001": ("2", "a hill", "a hill with a tree", [0, 512 * 512]),
    }
    mapping = {}
    for name, (kind, before, after, mask) in entries.items():
        path = f"{kind}_folder/1_artificial/{name}.jpg"
        (root / "annotation_images" / path).parent.mkdir(parents=True, exist_ok=True)
        scene(90, (512, 512)).save(root / "annotation_images" / path)
        mapping[name] = {
            "image_path": path,
            "original_prompt": before,
            "editing_prompt": after,
            "editing_instruction": "",
            "editing_type_id": kind,
            "blended_word": "",
            "mask": mask,
        }
    (root / "mapping_file.json").write_text(json.dumps(mapping))
    return root


def pie_bench_pp(root: Path) -> Path:
    """The same in Parquet, a folder per type, masks as words."""
    for folder, name, mask in (
        ("0_random_140", "000000000000", "0 262144"),
        ("2_add_object_80", "211000000000", "131072 512 131584 256"),
    ):
        row = {
            "id": name,
            "source_prompt": "a table",
            "target_prompt": "a table with [a blue cup]",
            "edit_action": "{}",
            "aspect_mapping": "{}",
            "blended_words": "[]",
            "mask": mask,
            "image": held(scene(90, (512, 512))),
        }
        save_rows(root / folder / "V1-00000-of-00001.parquet", [row])
    return root


def affordance_set(root: Path, count: int = 2) -> Path:
    """Pictures of 96 by 64; the boxes lie inside the central square."""
    root.mkdir(parents=True, exist_ok=True)
    items = []
    for i in range(count):
        scene(30 * i).save(root / f"park-{i}.png")
        items.append(
            {
                "image": f"park-{i}.png",
                "src_prompt": "a park with a bench",
                "tgt_prompt": "a park with a bench and a dog",
                "subject_token": "dog",
                "instruction": "add a dog",
                "boxes": [[16, 32, 48, 64], [48, 48, 80, 64]],
            }
        )
    (root / "items.json").write_text(json.dumps(items))
    return root


def coco_exemplar(root: Path, count: int = 3) -> Path:
    """Pictures of 64 by 64 with a box to fill; exemplars of another shape."""
    for i in range(count):
        name = f"{1000 + i:012d}"
        mask = np.zeros((64, 64), np.uint8)
        mask[16:48, 8 + i : 40 + i] = 255
        for folder, suffix, picture in (
            ("GT_3500", "GT", scene(30 * i, (64, 64))),
            ("Ref_3500", "ref", scene(200, (30, 20))),
            ("Mask_bbox_3500", "mask", Image.fromarray(mask)),
        ):
            (root / folder).mkdir(parents=True, exist_ok=True)
            picture.save(root / folder / f"{name}_{suffix}.png")
    return root


def mimicbrush_bench(root: Path) -> Path:
    """One item in each of three sets; the reference's part is marked in one, a prompt in one."""
    mask = np.zeros((64, 64), np.uint8)
    mask[8:40, 16:48] = 255
    for folder, name in (
        ("PartComp-Within", "dog"),
        ("PartComp-Cross", "shoe"),
        ("Texture_Cross", "vase"),
    ):
        place = root / folder
        place.mkdir(parents=True, exist_ok=True)
        scene(0, (64, 64)).save(place / f"{name}_source.png")
        scene(120, (96, 48)).save(place / f"{name}_reference.jpg")
        Image.fromarray(mask).save(place / f"{name}_source_mask.png")
    marked = np.zeros((48, 96), np.uint8)
    marked[10:30, 40:80] = 255
    Image.fromarray(marked).save(root / "PartComp-Cross" / "shoe_reference_mask.png")
    (root / "PartComp-Cross" / "prompts.json").write_text(json.dumps({"shoe": "a red shoe"}))
    return root


def ip2p(root: Path, count: int = 40) -> Path:
    """Forty folders of two pairs each; the last two are the test split."""
    listed = []
    for i in range(count):
        name, seeds = f"shard-00/{i:07d}", [str(100 + i), str(200 + i)]
        listed.append([name, seeds])
        (root / name).mkdir(parents=True)
        said = {"edit": "make it red", "output": f"a red house {i}"}
        said["input" if i % 2 else "caption"] = f"a house {i}"
        (root / name / "prompt.json").write_text(json.dumps(said))
        if i >= count - 2:
            for seed in seeds:
                for k in (0, 1):
                    shade = min(int(seed) // 2 + 60 * k, 255)
                    scene(shade, (64, 64)).save(root / name / f"{seed}_{k}.jpg")
    (root / "seeds.json").write_text(json.dumps(listed))
    return root
