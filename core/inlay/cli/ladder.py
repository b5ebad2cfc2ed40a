"""The ladder: where a run does not show the subject, the next set of options is tried.

The plugin `presence` says whether the subject is there, and ends a run that will not show it
before the remaining steps are spent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from inlay.cli import experiment
from inlay.cli.trace import Tracer
from inlay.events import Result
from inlay_config import config
from inlay_config.config import Experiment
from inlay_config.errors import ConfigError, Stopped

JUDGE = "presence"


@dataclass(frozen=True)
class Tried:
    """A rung. over: its options; scores: of its pictures; present: of any of them; step: where it
    was given up, None: it ran to its end."""

    over: dict[str, Any]
    scores: list[float]
    present: bool
    step: int | None


def climb(
    exp: Experiment,
    callback: Callable[[dict[str, Any]], None] | None = None,
    tracer: Tracer | None = None,
    pipe: Any = None,
) -> Result:
    """The experiment, then its `ladder` until a picture shows the subject.

    When the list is spent, the rung with the best score is run to its end. The weights are loaded
    once; pipe: a live pipeline of this experiment's model. result.record["ladder"] tells what was
    tried; the manifest repeats the rung that was taken, without climbing.
    """
    if not exp.ladder:
        return experiment.execute(exp, callback, tracer, pipe)
    steps = rungs(exp)
    pipe = experiment.load(exp) if pipe is None else pipe
    tried: list[Tried] = []
    for rung, over in zip(steps, ({}, *exp.ladder), strict=True):
        try:
            result = experiment.execute(rung, callback, tracer, pipe)
        except Stopped as stopped:
            tried.append(Tried(over, stopped.scores, False, stopped.step))
            continue
        said = result.record[JUDGE]
        tried.append(Tried(over, said["scores"], said["present"], None))
        if said["present"]:
            break
    else:
        best = max(range(len(tried)), key=lambda i: max(tried[i].scores))
        if best < len(tried) - 1 or tried[best].step is not None:
            result = experiment.execute(_whole(steps[best]), callback, tracer, pipe)
    result.record["ladder"] = [dict(vars(each)) for each in tried]
    return result


def rungs(exp: Experiment) -> list[Experiment]:
    """The experiment and one for each rung, every one over those before it; `seed: next` is the
    seed after. Raises ConfigError for a rung that does not fit, and where nobody judges."""
    if JUDGE not in exp.plugins:
        fix = f"Add plugins.{JUDGE}."
        raise ConfigError("nothing says whether the subject is there", where="ladder", fix=fix)
    made = [replace(exp, ladder=[])]
    for i, over in enumerate(exp.ladder):
        last, layer = made[-1], dict(over)
        if fixed := sorted(layer.keys() & {"model", "revision", "dtype", "device", "offload"}):
            problem, fix = f"{fixed[0]} cannot change", "A ladder runs on one loaded model."
            raise ConfigError(problem, where=f"ladder[{i}]", fix=fix)
        if layer.get("seed") == "next":
            layer["seed"] = last.seed + 1
        try:
            made.append(config.over(last, layer))
        except ConfigError as error:
            where = f"ladder[{i}].{error.where}".rstrip(".")
            raise ConfigError(error.problem, where=where, fix=error.fix) from error
    return made


def _whole(exp: Experiment) -> Experiment:
    """The same run, not ended early."""
    return config.over(exp, {"plugins": {JUDGE: {"stop": False}}})
