"""MimicBrush's two forwards, in the graph: what the reference U-Net's self-attention reads, and the
imitative U-Net that reads it too. For training; a run does the same by edits of a plugin.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from inlay_attention import Edit, Held, Rows, Seam, SiteProgram, project_kv

GIVEN = "kv:exemplar"


def readers(unet: Any) -> dict[str, Any]:
    """Self-attention in the middle and on the way up, by path."""
    modules = unet.named_modules()
    return {n: m for n, m in modules if n.endswith("attn1") and not n.startswith("down")}


def reference(unet: Any, z: Tensor, t: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """What self-attention reads, behind its norm, `b n c` by site, of clean latents `b c h w` at
    time t; the U-Net is evaluated no further than the last of these."""
    found, hooks, wanted = dict[str, Tensor](), [], readers(unet)

    def keep(site: str, hidden: Tensor) -> None:
        found[site] = hidden
        if len(found) == len(wanted):
            raise _Complete

    for site, module in wanted.items():
        hook = module.register_forward_pre_hook(lambda _, args, at=site: keep(at, args[0]))
        hooks.append(hook)
    try:
        unet(z, t, tokens)
    except _Complete:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found


def imitate(
    unet: Any, read: Mapping[str, Tensor], sample: Tensor, t: Tensor, tokens: Tensor,
    mix: float = 0.5, rows: int | None = None,
) -> Tensor:  # fmt: skip
    """The imitative U-Net's prediction `b c h w` of its channels `b 13 h w`; the first `rows` of
    them (None: all) read the exemplar, `read` of as many, or one, from `reference`.

    h + mix A(x; [x; r]) + (1 - mix) A(x; x), keys and values of r by the site's own weights;
    published: 0.5; the paper's equation 1: 1.
    """
    count = len(sample) if rows is None else rows
    parts = {"edit/text": count, "edit/null": len(sample) - count}
    batch = Rows.of({branch: n for branch, n in parts.items() if n})
    modules, programs = readers(unet), dict[str, Any]()
    for site, hidden in read.items() if count else ():
        programs[site] = program(site, batch, shared(modules[site], hidden, mix), mix)
    with Seam(modules if programs else {}) as seam:
        seam.programs = programs
        output: Tensor = unet(sample, t, tokens).sample
        seam.check()
    return output


def shared(module: Any, hidden: Tensor, mix: float) -> Held:
    """Keys and values of the exemplar for `append`, beside a `mix` of 1 - mix with the own map:
    that mix leaves what is appended as it is."""
    held = project_kv(module, hidden)
    return held if held.v is None else held._replace(v=mix * held.v)


def program(site: str, rows: Rows, given: Held, mix: float) -> SiteProgram:
    """What a site computes where "edit/text" of `rows` reads what `shared` made."""
    edits = [Edit("append", "imitation", "edit/text", from_=GIVEN, how="join")]
    if mix != 1:
        edits.append(Edit("mix", "imitation", "edit/text", value=1 - mix, from_="edit/text"))
    return SiteProgram(site, rows, {"edit/text": edits}, (), {}, _spans, {}, {GIVEN: given})


def _spans(queries: int, keys: int) -> tuple[dict[str, slice], dict[str, slice]]:
    return {"image": slice(0, queries)}, {"image": slice(0, keys)}


class _Complete(Exception):
    """All that is wanted of a forward is there."""
