"""Published benchmarks: their items from local folders or hub names, their measures, the networks
behind those. Importing registers them."""

from inlay_bench.benchmarks import (
    affordance_set,
    emu_edit,
    magicbrush,
    measures,
    pie_bench,
)

__all__ = ["affordance_set", "emu_edit", "magicbrush", "measures", "pie_bench"]
