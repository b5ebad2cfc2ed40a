"""The events, each with its contract. A plugin's `@hookimpl` takes the arguments that it uses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy
from torch import Tensor

if TYPE_CHECKING:
    from inlay_attention import AttnEdits, Rows

    from .events import AttnSite, Result, Step
    from .plan import Needs
    from .session import Run

hookspec = pluggy.HookspecMarker("inlay")
hookimpl = pluggy.HookimplMarker("inlay")


@hookspec
def inlay_declare(need: Needs) -> None:
    """Say what is needed: passes, lanes, edits, probes, board keys. No tensor exists yet."""


@hookspec
def inlay_prepare(run: Run) -> None:
    """Before the first pass; prompts are encoded, the input picture is on the board."""


@hookspec
def inlay_begin(run: Run, pass_: str, x: dict[str, Tensor]) -> None:
    """A pass starts. Fold: replace x[lane], the initial latent `b …` of each lane."""


@hookspec
def inlay_pre_step(run: Run, step: Step) -> None:
    """Before the forward. Fold: replace step.x[lane] (structure transfer, resetting a source)."""


@hookspec
def inlay_attention(run: Run, step: Step, site: AttnSite, edits: AttnEdits) -> None:
    """Collect the edits of one site in one evaluation; called only where they were declared."""


@hookspec
def inlay_inputs(run: Run, step: Step, rows: Rows, kwargs: dict[str, Any]) -> None:
    """Fold: change kwargs of one denoiser call, rows by branch (extra channels, tokens)."""


@hookspec(firstresult=True)
def inlay_combine(
    run: Run, step: Step, lane: str, text: Tensor, null: Tensor | None, scale: float
) -> Tensor | None:
    """A lane's predictions -> one model output; the first tensor wins. Default: classifier-free.
    What adds to any of them is a wrapper: `@hookimpl(wrapper=True)`, `output = yield`."""


@hookspec
def inlay_objective(run: Run, step: Step, lane: str) -> Tensor | None:
    """A loss of a lane declared by need.grad, weighted, a number or one per picture: from step.x0,
    step.x, step.probes, all in the graph. The core sums them and moves the lane against g."""


@hookspec
def inlay_denoised(run: Run, step: Step) -> None:
    """Fold: replace step.x0[lane]. Where nobody does, the model output is stepped untouched."""


@hookspec
def inlay_post_step(run: Run, step: Step) -> None:
    """After the solver step, probes complete. Fold: replace step.x_next[lane] (blending)."""


@hookspec
def inlay_observe(run: Run, step: Step) -> None:
    """Read only, after all folds: previews, metrics, progress. Writing raises."""


@hookspec
def inlay_final(run: Run, result: Result) -> None:
    """After the last pass. Fold: replace result.images[lane] `n 3 h w` in 0..1 (compositing)."""
