"""The scale at which the prompt looks at source and target alike (Add-it, section 3.2). No hooks.

f(gamma) = A_target / A_source - balance, where A is what the queries of the edit's prompt give to
the image keys of either, averaged over heads and over the blocks that hold the prompt apart. The
source does not depend on gamma: its keys are computed once. The rows of the edit go through those
blocks alone, and of their maps nothing but two columns is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import reduce
from scipy.optimize import brentq
from torch import Tensor

from inlay import AttnSite, Run, Step

EVALUATIONS = 12  # of the edit at most: both ends of the bracket, and Brent's method between them


class _Enough(Exception):
    """The last of the blocks has been seen: the rest of the model need not run."""


def gamma_of(
    run: Run, step: Step, sites: Sequence[AttnSite], balance: float,
    bracket: tuple[float, float] = (1.0, 1.2), xtol: float = 0.01,
) -> float:  # fmt: skip
    """The root of f in the bracket, or the end of it that is nearer to one. Makes one forward of
    the source and up to EVALUATIONS of the edit, each as deep as `sites` (joint) reach."""
    keys = _source_keys(run, step, sites)
    known: dict[float, float] = {}

    def f(gamma: float) -> float:
        if gamma not in known:
            source, target = _masses(run, step, sites, keys, gamma)
            known[gamma] = target / source - balance
        return known[gamma]

    low, high = bracket
    if f(low) * f(high) > 0:
        return low if abs(f(low)) < abs(f(high)) else high
    return float(brentq(f, low, high, xtol=xtol, maxiter=EVALUATIONS - 2, disp=False))


def _source_keys(
    run: Run, step: Step, sites: Sequence[AttnSite]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Image keys and values `1 h m d` of the source by site."""
    keys = {}

    def of(site: AttnSite, spans: Any) -> Callable[..., Tensor]:
        def program(sdpa: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **how: Any) -> Tensor:
            image = spans(q.shape[2], k.shape[2])[1]["image"]
            keys[site.name] = k[:, :, image], v[:, :, image]
            if site is sites[-1]:
                raise _Enough
            return torch.as_tensor(sdpa(q, k, v, *args, **how))

        return program

    _through(run, step, "source/text", sites, of)
    return keys


def _masses(
    run: Run, step: Step, sites: Sequence[AttnSite], keys: dict[str, tuple[Tensor, Tensor]],
    gamma: float,
) -> tuple[float, float]:  # fmt: skip
    """(A_source, A_target) with all keys of the edit scaled by gamma."""
    seen: list[Tensor] = []

    def of(site: AttnSite, spans: Any) -> Callable[..., Tensor]:
        def program(sdpa: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **how: Any) -> Tensor:
            q_spans, k_spans = spans(q.shape[2], k.shape[2])
            source_k, source_v = keys[site.name]
            theirs, n = source_k.shape[2], k.shape[0]
            every = torch.cat([source_k.expand(n, -1, -1, -1), gamma * k], dim=2)
            image = k_spans["image"]
            columns = k.new_zeros(every.shape[2], v.shape[3])  # as wide as a head: the fused path
            columns[:theirs, 0] = 1
            columns[theirs + image.start : theirs + image.stop, 1] = 1
            columns = columns.expand(*every.shape[:2], -1, -1)
            read = sdpa(q[:, :, q_spans["text"]], every, columns, scale=how.get("scale"))
            seen.append(reduce(read[..., :2].float(), "b h n c -> c", "mean"))
            if site is sites[-1]:
                raise _Enough
            values = torch.cat([source_v.expand(n, -1, -1, -1), v], dim=2)
            return torch.as_tensor(sdpa(q, every, values, scale=how.get("scale")))

        return program

    _through(run, step, "edit/text", sites, of)
    source, target = torch.stack(seen).mean(0).tolist()
    return source, target


def _through(
    run: Run, step: Step, branch: str, sites: Sequence[AttnSite],
    of: Callable[[AttnSite, Any], Callable[..., Tensor]],
) -> None:  # fmt: skip
    """The branch through the model up to the last of the sites."""
    text = run.conds[branch].embeds.shape[1]
    programs = {site.name: of(site, run.backbone.spans(site, text)) for site in sites}
    lane = branch.split("/")[0]
    try:
        run.evaluate(step, {branch: step.x[lane]}, programs=programs)
    except _Enough:
        return
