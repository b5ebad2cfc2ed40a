"""The test split of InstructPix2Pix's data (Brooks et al., 2023): pairs of generated pictures with
their captions and the instruction.

`seeds.json` lists [folder, [seeds]]; a folder holds `prompt.json` and `SEED_0.jpg`, `SEED_1.jpg`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np

from inlay_bench.benchmarks import files
from inlay_bench.benchmarks.frame import Frame
from inlay_bench.tasks import Item, provider
from inlay_config.errors import InputError
from inlay_config.images import safe_join

NAME = "InstructPix2Pix data"
TEST = 0.95  # of the list; what comes later is the test split


@provider("ip2p-tradeoff")
def ip2p_tradeoff(
    seed: int, data: str = "", whole: bool = False, side: int = 512
) -> Iterator[Item]:
    """Items in the list's order, one of each folder's pairs, chosen by the seed.

    data: the unpacked folder, or a hub name. whole: the whole list, not its last twentieth alone.
    A caption is read under `input` or `caption`, as one of the released programs writes it and
    another reads it. Raises InputError for files of another layout, and a missing picture.
    """
    root = files.root_of(data, NAME, ["*"])
    path = root / "seeds.json"
    if not path.is_file():
        raise files.wrong_layout(root, NAME, "seeds.json")
    listed = files.read_json(path, list)
    first = 0 if whole else int(TEST * len(listed))
    for i, entry in enumerate(listed[first:], first):
        where = f"{path}, entry {i}"
        try:
            name, seeds = str(entry[0]), [str(n) for n in entry[1]]
        except (TypeError, IndexError, KeyError) as error:
            raise InputError("this is no [folder, [seeds]]", where=where) from error
        if not seeds:
            raise InputError("there are no seeds", where=where)
        said = files.read_json(safe_join(root, f"{name}/prompt.json"))
        before = said.get("input") or said.get("caption")
        words, after = files.values(said, ("edit", "output"), f"{root / name}/prompt.json")
        if not before:
            problem = "the entry has neither 'input' nor 'caption'"
            raise InputError(problem, where=f"{root / name}/prompt.json")
        chosen = random.Random(f"{seed}/{name}").choice(seeds)
        source, target = (
            files.picture(safe_join(root, f"{name}/{chosen}_{k}.jpg"), where) for k in (0, 1)
        )
        frame = Frame(source.size, side)
        yield Item(
            id=name.replace("/", "-"),
            picture=frame.picture(source),
            texts={
                "source": before.strip(),
                "target": after.strip(),
                "instruction": words.strip(),
            },
            seed=seed + i,
            truth={"target": np.array(frame.picture(target))},
        )
