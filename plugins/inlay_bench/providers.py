"""The toybox's scenes as items of tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from inlay_bench.tasks import Item, provider
from inlay_config.errors import InputError

if TYPE_CHECKING:
    from inlay_toybox.quality import ExemplarItem

ENDLESS = 1_000_000


@provider("toybox-insertion")
def toybox_insertion(seed: int) -> Iterator[Item]:
    """Unseen scenes without their last object, and what is known of it."""
    import numpy as np

    from inlay_toybox import quality, world
    from inlay_toybox.classes import BY_NAME

    for i, item in enumerate(quality.insertion_items(ENDLESS, seed)):
        yield Item(
            id=f"{i:04d}",
            picture=item.picture,
            texts={
                "source": item.source_caption,
                "target": item.target_caption,
                "subject": item.subject,
            },
            seed=i,
            truth={
                "allowed": item.allowed,
                "footprint": item.footprint,
                "mask": item.mask,
                "picture": np.array(world.render(item.target, item.picture.width).image),
            },
            facts={
                "class": item.name,
                "habitat": BY_NAME[item.name].habitat,
                "held_out": item.held_out,
                "chance": item.chance,
                "things": [thing.name for thing in item.source.things],
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
