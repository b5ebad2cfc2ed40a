"""What cannot be had in a loop that inlay does not own is refused before it, by plugin and need."""

from __future__ import annotations

from collections.abc import Collection

from inlay import PlanConflict
from inlay.plan import Draft, Needs, Request
from inlay.session import EVENTS, Session

BOTH = ("declare", "prepare", "attention", "denoised")
GUEST = (*BOTH, "pre_step", "post_step", "observe", "final")
SAMPLED = (*BOTH, "inputs", "combine", "branch")
"""Events, and kinds of need, that may be had under a pipeline and under a sampler."""
WHY = {
    "begin": "somebody else draws the initial latents",
    "inputs": "the pipeline makes the model's inputs",
    "combine": "the pipeline combines the predictions",
    "branch": "the pipeline decides what the model is called with",
    "call": "somebody else calls the model, and keeps no graph",
    "final": "a sampler ends with latents, not with pictures",
}


def refuse(session: Session, request: Request, had: Collection[str]) -> bool:
    """Let every plugin declare; whether one touches attention. had: GUEST or SAMPLED. Raises
    PlanConflict for the first plugin that needs something else."""
    touched = False
    for owner in session.plugins:
        draft = Draft(published=dict.fromkeys(request.inputs, "input"))
        needs = Needs(owner, request, session.backbone.sites, draft)
        session.hook_of("inlay_declare", owner)(need=needs)
        for what, key in draft.owners:
            own = what == "lane" and key == ("edit", "edit") and not draft.fields[what, key]
            if what not in had and not own:
                named = key if isinstance(key, str) else "/".join(key[1:])
                raise _refused(owner, f"needs the {what} {named!r}", what)
        if draft.grads:
            raise _refused(owner, f"needs the gradient of lane {draft.grads[0].lane!r}", "call")
        if draft.on_request:
            raise _refused(owner, "needs evaluations of its own", "call")
        touched = touched or bool(draft.edits or draft.probes)
    for event in EVENTS:
        name = event.removeprefix("inlay_")
        for impl in getattr(session.manager.hook, event).get_hookimpls():
            harmless = name in had or (name == "begin" and "x" not in impl.argnames)
            if impl.plugin_name in session.plugins and not harmless:
                raise _refused(impl.plugin_name, f"acts in {event}", name)
    return touched


def _refused(owner: str, need: str, what: str) -> PlanConflict:
    why = WHY.get(what, "that takes a loop of inlay's own")
    problem = f"{owner} {need}, which is not to be had here: {why}"
    return PlanConflict(problem, where=f"plugins.{owner}", fix="Use Session.run.")
