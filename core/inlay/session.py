"""Session: a pipeline and plugins -> plan -> passes -> Result. `Run` is what plugins see of one."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pluggy
import torch
from torch import Tensor

from inlay_attention import Seam, Store
from inlay_config import config, images, registry
from inlay_config.config import Experiment, Gradient
from inlay_config.errors import ModelError, PluginError

from . import backbones, guidance, hookspecs, objectives
from .backbones import levels, schedulers, text
from .backbones.text import Cond
from .board import Board
from .cli.trace import Tracer
from .events import Lane, Plugin, Result, Step
from .kv import Tape, facts
from .loop import evaluate, run_pass
from .plan import PassPlan, Plan, Request, make_plan

Callback = Callable[[dict[str, Any]], None]
Place = tuple[str, str]  # pass, lane
EVENTS = [name for name in vars(hookspecs) if name.startswith("inlay_")]


class Run:
    """One run as plugins see it. conds: by branch; words[probe]: text tokens; lengths: of prompts
    with padding to be hidden; x_T[pass, lane]: unit-variance initial noise; finals[pass][lane]:
    last latents so far; unguided[lane]: the latest x0 of a lane with losses, before their move."""

    def __init__(self, session: Session, plan: Plan, callback: Callback | None, **given: Any):
        self.plan, self.callback, self.hook = plan, callback, session.manager.hook
        self.backbone, self.seed = session.backbone, plan.request.seed
        self.device, self.dtype = session.backbone.device, session.backbone.dtype
        self.prompts, self.size = plan.request.prompt, plan.request.size
        self.board, self.conds = Board(dict(plan.publishes)), dict[str, Cond]()
        self.words, self.lengths = dict[str, tuple[int, ...]](), dict[str, int]()
        self.x_T, self.generators = dict[Place, Tensor](), dict[Place, torch.Generator]()
        self.finals, self.timings = dict[str, dict[str, Tensor]](), dict[str, float]()
        self.hook_of, self._scheduler = session.hook_of, session.scheduler
        self._sigmas, self._noise = given.get("sigmas"), given.get("noise") or {}
        self.unguided, self.evaluated, self.seam = dict[str, Tensor](), 0, Seam({})
        self.variance_type = str(self._scheduler.config.get("variance_type", ""))
        self.tape = Tape(session.store, plan, session.backbone)

    def rng(self, *names: str) -> torch.Generator:
        """A generator for (seed, names): adding a plugin never moves another's noise."""
        digest = hashlib.sha256("/".join((str(self.seed), *names)).encode()).digest()
        return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def noise(self, name: str, shape: Sequence[int]) -> Tensor:
        """Standard normal noise of the stream `name`, or what the caller injected under it."""
        drawn = self._noise.get(name)
        drawn = torch.randn(*shape, generator=self.rng(name)) if drawn is None else drawn
        return drawn.to(self.device, self.dtype)

    @property
    def sites(self) -> set[str]:
        """Sites that are edited, read or kept, and those where a prompt's padding is hidden."""
        padded = {s.name for s in self.backbone.sites if self.lengths and s.kind != "self"}
        return {*self.plan.sites, *self.tape.sites, *padded}

    def evaluate(self, step: Step, x: Mapping[str, Tensor], **given: Any) -> dict[str, Tensor]:
        """See `loop.evaluate`."""
        return evaluate(self, step, x, **given)

    def initial(self, pass_: str, lane: Lane) -> Tensor:
        """x_T of a lane, drawn or injected; its generator then feeds the scheduler, as in stock."""
        key, given = (pass_, lane.name), self._noise.get(lane.name)
        self.generators[key] = torch.Generator("cpu").manual_seed(lane.seed)
        self.x_T[key] = self.backbone.latent(lane.n, self.size, self.generators[key], given)
        return self.x_T[key]

    def schedule(self, pass_: PassPlan) -> Any:
        """A fresh scheduler with this run's timesteps, or the solver that the pass asked for."""
        base, steps = copy.deepcopy(self._scheduler), self.plan.request.steps
        self.backbone.set_timesteps(base, steps, self._sigmas, self.size)
        return pass_.scheduler(base) if pass_.scheduler else base


class Session:
    """A pipeline with plugins. pipe: a diffusers pipeline, a folder, a hub name, "toybox/flux".

    plugins: name -> options, in execution order; a name is a plugin or a preset, a value may be a
    live Plugin. skip_dead_rows=False evaluates every lane in every step. resolve: rules {site,
    winner} for edits that clash. store: lanes recorded by the first run, replayed by later ones.
    gradient: what is done with summed losses. tracer: times every run. compile: the model with its
    edits; torch.compile's options, and `regional`. Raises ConfigError and ModelError; PlanConflict
    when a run is planned.
    """

    def __init__(
        self,
        pipe: Any,
        plugins: Mapping[str, Any] | None = None,
        scheduler: Any = None,
        *,
        dtype: str = "float32",
        device: str = "auto",
        offload: str = "none",
        revision: str | None = None,
        skip_dead_rows: bool = True,
        resolve: Sequence[Mapping[str, str]] = (),
        store: Store | None = None,
        gradient: Gradient | None = None,
        tracer: Tracer | None = None,
        compile: bool | Mapping[str, Any] = False,
    ) -> None:
        model, self.folder, self.skip_dead_rows = str(pipe), "", skip_dead_rows
        self.store, self.tracer = store, tracer or Tracer.asked_for()
        if isinstance(pipe, str | Path):
            self.folder = registry.resolve_model(model)
            pipe = backbones.load(self.folder, dtype, device, offload, revision)
        else:
            model = str(pipe.config.get("_name_or_path") or type(pipe).__name__)
        self.backbone = backbones.adapt(pipe)
        self.compiled = backbones.Compiled(self.backbone, compile) if compile else None
        self.scheduler = schedulers.choose(self.backbone, scheduler)
        live = {name: p for name, p in (plugins or {}).items() if isinstance(p, Plugin)}
        options = {name: None if name in live else v for name, v in (plugins or {}).items()}
        listed = config.expand_presets(options)
        self.plugins = {k: live.get(k) or registry.build(k, v) for k, v in listed.items()}
        self.setup: dict[str, Any] = {"model": model, "revision": revision, "offload": offload}
        self.setup |= {"plugins": options, "scheduler": type(self.scheduler).__name__}
        self.setup |= {"resolve": [dict(r) for r in resolve], "gradient": gradient or Gradient()}
        self.setup |= {"compile": self.compiled.asked if self.compiled else False}
        self.manager, self._callers = pluggy.PluginManager("inlay"), dict[tuple[str, str], Any]()
        self.manager.add_hookspecs(hookspecs)
        try:
            for name, plugin in reversed(self.plugins.items()):  # pluggy calls the last one first
                plugin.name = name
                self.manager.register(plugin, name)
            self.manager.register(guidance)
            self.manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(" ".join(str(error).split()), where="plugins") from error

    def hook_of(self, event: str, owner: str) -> Any:
        """An event for one plugin alone."""
        if (event, owner) not in self._callers:
            others = [plugin for name, plugin in self.plugins.items() if name != owner]
            self._callers[event, owner] = self.manager.subset_hook_caller(event, others)
        return self._callers[event, owner]

    def plan(self, asked: Experiment, picture: tuple[int, int] | None, inputs: list[str]) -> Plan:
        """Every plugin declares; conflicts raise here. No tensor is made.

        picture: (height, width) px of the input picture; inputs: which of image, mask are given.
        """
        size = self.backbone.fit(asked.size, picture)
        request = Request(
            {**config.to_dict(asked)["prompt"]},
            size=size,
            grid=self.backbone.grid(size),
            inputs=tuple(key for kind in inputs for key in images.BOARD[kind]),
            skip_dead_rows=self.skip_dead_rows,
            resolve=tuple(asked.resolve),
            gradient=asked.gradient,
            levels=lambda: levels.of_run(self.scheduler, self.backbone, asked.steps, size),
            guided=lambda lane: self.backbone.cfg_scale(request.scale(lane), asked.true_cfg) > 1,
            replays=bool(self.store and self.store.facts),
            **{k: getattr(asked, k) for k in ("steps", "n", "seed", "guidance", "true_cfg")},
        )
        impls = {event: getattr(self.manager.hook, event).get_hookimpls() for event in EVENTS}
        ours = {e: [i for i in reversed(impls[e]) if i.plugin is not guidance] for e in EVENTS}
        order = {e[6:]: tuple(i.plugin_name for i in listed) for e, listed in ours.items()}
        plan = make_plan(self.plugins, self.hook_of, order, request, self.backbone)
        plan = objectives.check(plan, self.scheduler)
        if self.store:
            plan.memory["store"] = Tape(self.store, plan, self.backbone).size
        return plan

    @torch.no_grad()
    def run(
        self,
        prompt: str | Mapping[str, str] = "",
        image: Any = None,
        mask: Any = None,
        guidance: float | Mapping[str, float] = 3.5,
        true_cfg: float = 1.0,
        size: Any = None,
        n: int = 1,
        steps: int = 28,
        sigmas: Sequence[float] | None = None,
        seed: int = 0,
        conds: Mapping[str, Any] | None = None,
        noise: Mapping[str, Tensor] | None = None,
        callback: Callback | None = None,
    ) -> Result:
        """Plan, then run every pass.

        prompt: {"source", "edit", "negative"}, or the edit prompt. image, mask: a path, a PIL
        picture or `1 c h w` in 0..1. guidance: one scale, or one per lane. size: side or (height,
        width) px. conds: prompt or branch name -> Cond. noise: lane or stream name -> tensor.
        """
        started = time.perf_counter()
        pictures = images.as_pictures(image=image, mask=mask)
        asked = Experiment(
            prompt=config.Prompt(**({"edit": prompt} if isinstance(prompt, str) else prompt)),
            guidance=dict(guidance) if isinstance(guidance, Mapping) else guidance,
            size=list(size) if isinstance(size, tuple) else size,
            **self.setup | {"true_cfg": true_cfg, "n": n, "steps": steps, "seed": seed},
        )
        shape = pictures["image"].size[::-1] if "image" in pictures else None
        plan = self.plan(asked, shape, list(pictures))
        run = Run(self, plan, callback, sigmas=sigmas, noise=noise)
        asked.device, asked.dtype = run.device.type, str(run.dtype).removeprefix("torch.")
        self.encode(run, conds or {})
        with ExitStack() as stack:
            sites = self.backbone.modules if self.compiled else run.sites
            modules = {k: m for k, m in self.backbone.modules.items() if k in sites}
            seam = run.seam = stack.enter_context(Seam(modules, self.compiled is not None))
            if plan.grads:
                stack.enter_context(self.backbone.frozen(seam, plan.request.gradient.checkpoint))
            stack.enter_context(self.compiled.running() if self.compiled else nullcontext())
            if self.tracer:
                stack.enter_context(self.tracer.watch(self, seam))
            self.prepare(run, pictures)
            for pass_ in plan.passes:
                begun = time.perf_counter()
                if callback:
                    callback({"kind": "pass", "pass": pass_.name, "steps": steps})
                run.finals[pass_.name] = run_pass(run, pass_)
                run.timings[pass_.name] = time.perf_counter() - begun
        if run.tape.records:
            run.tape.store.close()
        result = self._finish(run)
        run.timings["total"] = time.perf_counter() - started
        place = {"device": str(run.device), "dtype": asked.dtype, "seed": seed, "plan": plan.digest}
        place |= {"folder": self.folder, "threads": torch.get_num_threads(), "timings": run.timings}
        result.record |= {"experiment": config.to_dict(asked), "pictures": pictures, **place}
        if callback:
            callback({"kind": "done"})
        return result

    def encode(self, run: Run, given: Mapping[str, Any]) -> None:
        """Each prompt once, all to one length; find the words that plugins named."""
        encoded: dict[str, Cond] = {}
        for branch in (b for p in run.plan.passes for b in p.branches):
            ready = given.get(branch.name, given.get(branch.cond))
            if ready is None and branch.cond not in encoded:
                encoded[branch.cond] = self.backbone.encode_text(run.prompts[branch.cond])
            cond = encoded[branch.cond] if ready is None else ready
            cond = cond if isinstance(cond, Cond) else Cond(**cond)
            run.conds[branch.name] = cond.to(run.device, run.dtype)
        run.conds, run.lengths = text.even(run.conds)
        for name, (place, word, where) in run.plan.words.items():
            run.words[name] = text.find(run.conds[place], word, where)

    def prepare(self, run: Run, pictures: Mapping[str, Any]) -> None:
        """Put the pictures on the board and let plugins prepare."""
        run.board.update(images.on_board(pictures, run.size, run.device))
        if self.store:
            self.store.open(facts(run, self.scheduler))
        run.hook.inlay_prepare(run=run)

    def _finish(self, run: Run) -> Result:
        """Decode the lanes that are kept and let plugins compose the pictures."""
        begun, latents = time.perf_counter(), dict[str, Tensor]()
        for pass_ in run.plan.passes:
            kept, final = [ln.name for ln in pass_.lanes if ln.keep], run.finals[pass_.name]
            latents |= {name: final[name] for name in kept if name in final}
        for name, latent in latents.items():
            if not torch.isfinite(latent).all():
                fix = "Use dtype=float32, or look at the plugins that write latents."
                raise ModelError("values are not finite", where=f"final, lane {name}", fix=fix)
        decoded = latents if self.backbone.decodes else {}
        pictures = {name: self.backbone.decode(x, run.size) for name, x in decoded.items()}
        result = Result(pictures, latents, run.board)
        run.hook.inlay_final(run=run, result=result)
        self.backbone.pipe.maybe_free_model_hooks()
        run.timings["decode"] = time.perf_counter() - begun
        return result
