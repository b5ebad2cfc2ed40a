"""Which attention sites show best where the words of a prompt are in the picture. No hooks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from inlay import AttnSite, ConfigError, Needs

UNET_SIDE = 16  # cells per side of the cross-attention maps with the clearest shapes (SD at 512 px)


def word_sites(
    need: Needs, names: Iterable[str], where: str, depths: Mapping[str, Iterable[float]]
) -> dict[str, AttnSite]:
    """Sites by name: as asked; else of a transformer those at relative `depths` of each kind of
    block, of a U-Net those whose maps are nearest to 16 x 16.

    where: the YAML path of `names`. Raises ConfigError for a name that is no site which sees text.
    """
    known = {site.name: site for site in need.sites if site.kind != "self"}
    if missing := [name for name in names if name not in known]:
        fix = f"This model has {', '.join(known)}."
        problem = f"no attention site {missing[0]!r} that sees text"
        raise ConfigError(problem, where=where, fix=fix)
    if chosen := {name: known[name] for name in names}:
        return chosen
    for block, shares in depths.items():
        inside = [site for site in known.values() if site.block == block]
        picked = {round(depth * (len(inside) - 1)) for depth in shares} if inside else ()
        chosen |= {inside[i].name: inside[i] for i in sorted(picked)}
    if chosen:
        return chosen
    outer = [site for site in known.values() if site.block != "mid"]
    side = max(need.request.grid)
    scale = min({site.scale for site in outer}, key=lambda s: abs(math.log2(side / s / UNET_SIDE)))
    return {site.name: site for site in outer if site.scale == scale}
