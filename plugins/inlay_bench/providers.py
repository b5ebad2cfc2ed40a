"""The toybox's scenes as items of tasks."""

from __future__ import annotations

from collections.abc import Iterator

from inlay_bench.tasks import Item, provider

ENDLESS = 1_000_000


@provider("toybox-insertion")
def toybox_insertion(seed: int) -> Iterator[Item]:
    """Unseen scenes without their last object, and what is known of it."""
    from inlay_toybox import quality

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
            truth={"allowed": item.allowed, "footprint": item.footprint, "mask": item.mask},
            facts={
                "class": item.name,
                "held_out": item.held_out,
                "chance": item.chance,
                "things": [thing.name for thing in item.source.things],
            },
        )
