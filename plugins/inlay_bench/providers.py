"""The toybox's scenes as items of tasks."""

from __future__ import annotations

from collections.abc import Iterator

from inlay_bench.tasks import Item, provider

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
