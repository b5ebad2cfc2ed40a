"""Plugins in pairs on the toybox's models: what a plan says of them, and what a run of them did.

Used by tests/test_compose.py and by docs/generate.py, which writes the matrix of docs/compose.md.
"""

from __future__ import annotations

import copy
import json
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations, product

import torch
import torch.nn.functional as F

import inlay
from inlay import ConfigError, PlanConflict, Plugin, hookimpl
from inlay_attention import SiteProgram
from inlay_config import registry
from inlay_config.config import Experiment, Prompt
from inlay_config.images import to_tensor
from inlay_toybox import world
from invariants import CASES

MODELS = {"toybox/flux": {"guidance": 1.0, "true_cfg": 3.0}, "toybox/sd": {"guidance": 3.0}}
PROMPT = {"source": "a view of the grass", "edit": "a cow on the grass"}
SIDE, STEPS = 32, 4  # pixels, solver steps: hundreds of runs take a minute
SHIPPED = [name for name, entry in registry.plugins().items() if entry["source"] == "inlay"]
PLUGINS = [name for name in SHIPPED if name in CASES and not CASES[name].model]
PAIRS = list(combinations(PLUGINS, 2))


@dataclass(frozen=True)
class Call:
    """What one attention site was asked for in one model call of step `step`."""

    step: int
    site: str
    program: SiteProgram
    args: tuple
    options: dict

    @property
    def spans(self):
        """Keys by name."""
        q, k, *_ = self.args
        return self.program.spans(q.shape[2], k.shape[2])[1]

    def answer(self, v, without=""):
        """The site's output `R h n c` for values `R h m c`, without the edits of one plugin."""
        q, k, _, *rest = self.args
        listed = self.program.edits.items()
        edits = {branch: [e for e in es if e.plugin != without] for branch, es in listed}
        program = replace(self.program, edits=edits, probes=())
        return program(F.scaled_dot_product_attention, q, k, v, *rest, **self.options)

    def share(self, branch, *marked, without=""):
        """The attention `b h n c` that the branch's image queries pay to each of `marked`: (branch,
        a span or text tokens). Exact, edits being linear in the values."""
        k, keys = self.args[1], self.spans
        v = k.new_zeros(*k.shape[:3], len(marked))
        for column, (owner, span) in enumerate(marked):
            tokens = keys[span] if isinstance(span, str) else list(span)
            v[self.program.rows[owner], :, tokens, column] = 1
        return self.of(branch, self.answer(v, without))

    def of(self, branch, tokens):
        """The branch's image tokens of `R h n c`."""
        image = self.program.spans(tokens.shape[2], tokens.shape[2])[0]["image"]
        return tokens[self.program.rows[branch], :, image]

    def edited_by(self, plugin):
        """Branches that the plugin edits here."""
        listed = self.program.edits.items()
        return [branch for branch, edits in listed if any(e.plugin == plugin for e in edits)]


class Recorder(Plugin):
    """Keeps every step of the edit after all folds, and every attention call; changes nothing.

    A kept step's `unguided` is its x0 before losses moved it.
    guided: the lane's output by (evaluation, lane) before any plugin wraps the combination;
    estimated: the clean estimate of the edit by evaluation, before any plugin folds it.
    """

    def __init__(self):
        super().__init__(name="recorder")
        self.steps, self.calls, self.run = [], [], None
        self.guided, self.estimated = {}, {}

    @contextmanager
    def watch(self, session, seam):
        """The session's tracer: sees what the seam computes."""
        seam.watch = lambda site, program: partial(self._call, site, program)
        try:
            yield
        finally:
            seam.watch = None

    def _call(self, site, program, sdpa, *args, **options):
        self.calls.append(Call(self.now, site, program, args, options))
        return program(sdpa, *args, **options)

    @hookimpl
    def inlay_pre_step(self, run, step):
        self.run, self.now = run, step.index

    @hookimpl(wrapper=True)
    def inlay_combine(self, step, lane):
        output = yield
        self.guided[step.eval, lane] = output
        return output

    @hookimpl(tryfirst=True)
    def inlay_denoised(self, step):
        if "edit" in step.lanes:
            self.estimated[step.eval] = step.x0["edit"]

    @hookimpl
    def inlay_observe(self, run, step):
        if step.pass_ == "edit":
            kept = copy.copy(step)
            kept.x, kept.unguided = dict(step.x), dict(run.unguided)
            self.steps.append(kept)

    def edited(self, plugin):
        """(call, branch) of every place that the plugin edited. Raises when there is none."""
        found = [(call, branch) for call in self.calls for branch in call.edited_by(plugin)]
        assert found, f"{plugin} edited nothing"
        return found


@dataclass(frozen=True)
class Made:
    """A run: its plugins, its result, and what was recorded of it."""

    plugins: dict
    result: inlay.Result
    record: Recorder

    @property
    def picture(self):
        return self.result.images["edit"]

    @property
    def board(self):
        return self.result.board


@cache
def picture():
    """An empty meadow, and the mask of where a cow may stand: `1 c h w`."""
    scene = next(s for s in map(world.sample, range(1000)) if s.ground == "grass" and not s.sunset)
    for _ in scene.things:
        scene = scene.without(0)
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., SIDE // 2 : -4, 8:-8] = 1
    return to_tensor(world.render(scene, SIDE).image), mask


def plugins(*names):
    """What is needed to run these plugins together, in the registry's order, with options."""
    wanted = {*names, *(c for name in names for c in CASES[name].companions)}
    listed = {name: dict(CASES[name].options) for name in PLUGINS if name in wanted}
    for name, other in product(listed, names):
        listed[name] |= CASES[name].beside.get(other, {})
    return listed


def run(pipe, model, *names):
    """The plugins in one session."""
    listed, recorder = plugins(*names), Recorder()
    session = inlay.Session(pipe, {**listed, "recorder": recorder}, tracer=recorder)
    image, mask = picture()
    asked = {"size": SIDE, "steps": STEPS, "seed": 5, **MODELS[model]}
    return Made(listed, session.run(PROMPT, image, mask, **asked), recorder)


def needs(a, b):
    """Which of the two runs with the other only, or ""."""
    return next((one for one, other in ((a, b), (b, a)) if other in CASES[one].companions), "")


@cache
def built(name, options):
    """A plugin with options in JSON: a thousand plans are made of a few dozen of them."""
    return registry.build(name, json.loads(options))


def verdict(pipe, model, a, b, resolve=()):
    """ "composes"; "needs", when one runs with the other only; or the message of the refusal."""
    if needs(a, b):
        return "needs"
    asked = {"steps": STEPS, "seed": 5, "size": [SIDE, SIDE], **MODELS[model]}
    experiment = Experiment(prompt=Prompt(**PROMPT), resolve=list(resolve), **asked)
    try:
        listed = {name: built(name, json.dumps(told)) for name, told in plugins(a, b).items()}
        session = inlay.Session(pipe, listed, resolve=resolve)
        session.plan(experiment, (SIDE, SIDE), ["image", "mask"])
    except (PlanConflict, ConfigError) as error:
        return str(error)
    return "composes"
