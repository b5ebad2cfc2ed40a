"""The events, typed, each with its contract. A plugin implements any of them with `@hookimpl` and takes only the arguments it uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy
from torch import Tensor

if TYPE_CHECKING:
    from .edits import AttnEdits
    from .events import AttnSite, ModelCall, Preds, Result, Step
    from .plan import Needs
    from .session import Run

hookspec = pluggy.HookspecMarker("inlay")
hookimpl = pluggy.HookimplMarker("inlay")


@hookspec
def inlay_declare(need: Needs) -> None:
    """Say what the plugin needs: passes, lanes, edits, probes, board keys. No tensor exists yet. All plugins, in order."""


@hookspec
def inlay_prepare(run: Run) -> None:
    """Before the first pass: prompts are encoded, the input picture is on the board. Publish what the loop will need."""


@hookspec
def inlay_begin(run: Run, pass_: str, x: dict[str, Tensor]) -> None:
    """A pass starts. Fold: replace x[lane], the initial latent `b …` of each lane."""


@hookspec
def inlay_pre_step(run: Run, step: Step) -> None:
    """Before the forward. Fold: replace step.x[lane] (structure transfer, resetting a source)."""


@hookspec
def inlay_attention(run: Run, step: Step, site: AttnSite, edits: AttnEdits) -> None:
    """Collect the edits of one subscribed site in one evaluation; called only inside the windows the plugin declared."""


@hookspec
def inlay_inputs(run: Run, call: ModelCall) -> None:
    """Fold: change call.kwargs, the keyword arguments of one denoiser call (extra channels or tokens)."""


@hookspec(firstresult=True)
def inlay_combine(run: Run, preds: Preds) -> Tensor | None:
    """Predictions of a lane -> one model output. The first plugin that returns a tensor wins; default: guidance.cfg."""


@hookspec
def inlay_denoised(run: Run, step: Step) -> None:
    """Fold: replace step.x0[lane]. A lane whose x0 nobody writes is stepped with the untouched model output."""


@hookspec
def inlay_post_step(run: Run, step: Step) -> None:
    """After the solver step. Fold: replace step.x_next[lane] (latent blending). step.probes is complete here."""


@hookspec
def inlay_observe(run: Run, step: Step) -> None:
    """Read only, after all folds: previews, metrics, progress. Writing raises."""


@hookspec
def inlay_final(run: Run, result: Result) -> None:
    """After the last pass. Fold: replace result.images[lane] `n 3 h w` in 0..1 (compositing)."""
