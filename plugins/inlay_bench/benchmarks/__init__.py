"""Published benchmarks: their items from local folders or hub names, their measures, the networks
behind those. Importing registers them."""

from inlay_bench.benchmarks import (
    affordance_set,
    coco_exemplar,
    emu_edit,
    imitations,
    ip2p_tradeoff,
    magicbrush,
    measures,
    mimicbrush_bench,
    pie_bench,
)

__all__ = [
    "affordance_set",
    "coco_exemplar",
    "emu_edit",
    "imitations",
    "ip2p_tradeoff",
    "magicbrush",
    "measures",
    "mimicbrush_bench",
    "pie_bench",
]
