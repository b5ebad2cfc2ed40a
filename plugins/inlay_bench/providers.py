"""The toybox's scenes as items of tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from inlay_bench.tasks import Item, provider
from inlay_config.config import suggest
from inlay_config.errors import ConfigError, InputError

if TYPE_CHECKING:
    from inlay_toybox.quality import ExemplarItem

ENDLESS = 1_000_000


@provider("toybox-insertion")
def toybox_insertion(seed: int, kind: str = "") -> Iterator[Item]:
    """Unseen scenes without their last object, and what is known of it.

    kind: "", or one that the papers call hard (inlay_toybox.quality.limits): terse, crowded, again,
    beside.
    """
    import numpy as np

    from inlay_toybox import edits, quality, world
    from inlay_toybox.classes import BY_NAME
    from inlay_toybox.quality import limits

    hard = {f.__name__: f for f in (limits.terse, limits.crowded, limits.again, limits.beside)}
    kinds = {"": quality.insertion_items, **hard}
    if kind not in kinds:
        where = "data.options.kind"
        raise ConfigError(f"no kind '{kind}' of items", where=where, fix=suggest(kind, hard))
    for i, item in enumerate(kinds[kind](ENDLESS, seed)):
        drawn, asked = world.render(item.source, item.picture.width), {}
        if kind == "beside":
            asked = {"side": limits.SIDES[i % 2], "anchor": item.source.things[0].x}
        alike = [thing.name == item.name for thing in item.source.things]
        yield Item(
            id=f"{i:04d}",
            picture=item.picture,
            texts={
                "source": item.source_caption,
                "target": item.target_caption,
                "subject": item.subject,
                "instruction": edits.addition(item.target, len(item.target.things) - 1).instruction,
            },
            seed=i,
            truth={
                "allowed": item.allowed,
                "footprint": item.footprint,
                "mask": item.mask,
                "present": np.any(drawn.masks[alike], 0),
                "picture": np.array(world.render(item.target, item.picture.width).image),
            },
            facts={
                "class": item.name,
                "habitat": BY_NAME[item.name].habitat,
                "held_out": item.held_out,
                "chance": item.chance,
                "things": [thing.name for thing in item.source.things],
                **asked,
            },
        )


@provider("toybox-captions")
def toybox_captions(seed: int) -> Iterator[Item]:
    """The captions of such scenes, for a model that draws the input itself: where things are in
    its picture nobody knows, so there is no truth beyond the words."""
    for item in toybox_insertion(seed):
        facts = {k: v for k, v in item.facts.items() if k != "chance"}
        yield Item(id=item.id, picture=None, texts=item.texts, seed=item.seed, facts=facts)


@provider("toybox-exemplar")
def toybox_exemplar(seed: int) -> Iterator[Item]:
    """Unseen scenes with a box to fill, and another view of the object that is to fill it."""
    from inlay_toybox import quality

    for i, item in enumerate(quality.exemplar_items(ENDLESS, seed)):
        yield _exemplar(i, item)


@provider("toybox-imitation")
def toybox_imitation(seed: int, kinds: Sequence[str] = ("part", "texture")) -> Iterator[Item]:
    """Unseen scenes with a region that is to look like a reference. kinds: part, texture; they take
    turns. Raises InputError for another."""
    from inlay_toybox import quality

    if unknown := set(kinds) - {"part", "texture"} or not kinds:
        fix = "Name part, texture or both."
        raise InputError(f"no such kinds: {unknown or kinds}", where="data.options.kinds", fix=fix)
    for i, item in enumerate(quality.imitation_items(ENDLESS, seed, kinds=tuple(kinds))):
        yield _exemplar(i, item)


def _exemplar(i: int, item: ExemplarItem) -> Item:
    """An item whose mask and exemplar a method gets."""
    import numpy as np
    from PIL import Image

    from inlay_toybox import world

    scene, subject = item.source, item.subject
    return Item(
        id=f"{i:04d}",
        picture=item.picture,
        texts={"source": scene.caption, "target": item.target.caption, "subject": subject},
        seed=i,
        truth={
            "allowed": world.affordance(scene, item.name, item.picture.width),
            "region": item.region,
            "footprint": item.footprint,
            "mask": item.mask,
            "picture": item.truth,
            "cutout": item.cutout,
        },
        facts={
            "class": item.name,
            "colour": item.colour,
            "kind": item.kind,
            "held_out": item.held_out,
        },
        given={
            "mask": Image.fromarray(item.region.astype(np.uint8) * 255),
            "exemplar": item.exemplar,
        },
    )


@provider("toybox-instructions")
def toybox_instructions(seed: int, kinds: Sequence[str] = ()) -> Iterator[Item]:
    """Unseen scenes, an instruction, and the scene after it. kinds: of `inlay_toybox.edits`, the
    mixture of training by default. Raises InputError for another."""
    import numpy as np
    from PIL import Image

    from inlay_toybox import edits, world
    from inlay_toybox.quality.shares import INSTRUCTIONS, STRIDE
    from inlay_toybox.training import UNSEEN

    if unknown := set(kinds) - set(edits.KINDS):
        fix = f"Name some of {', '.join(edits.KINDS)}."
        raise InputError(f"no such kinds: {unknown}", where="data.options.kinds", fix=fix)
    for i in range(ENDLESS):
        first = UNSEEN + INSTRUCTIONS + seed * STRIDE
        edit = edits.draw(first + i, tuple(kinds) or edits.MIXTURE, held_out=True)
        before, after = (world.render(scene).image for scene in (edit.before, edit.after))
        old, new = ([(t.name, t.colour) for t in s.things] for s in (edit.before, edit.after))
        added = [thing for thing in new if thing not in old]
        yield Item(
            id=f"{i:04d}",
            picture=Image.fromarray(before),
            texts={
                "source": edit.before.caption,
                "target": edit.after.caption,
                "instruction": edit.instruction,
                "subject": added[0][0] if added else "",
            },
            seed=i,
            truth={"target": np.array(after), "footprint": (before != after).any(-1)},
            facts={
                "kind": edit.kind,
                "added": added,
                "removed": [name for name, _ in old if name not in [n for n, _ in new]],
            },
        )
