"""Session: a pipeline and plugins -> plan -> passes -> Result. `Run` is what plugins see of one."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pluggy
import torch
from torch import Tensor

from inlay_config import config, manifest, registry
from inlay_config.config import Experiment

from . import backbones, hookspecs
from .attention import Seam
from .backbones import images, schedulers, text
from .board import Board
from .errors import ModelError
from .events import Cond, Lane, Plugin, Result, Step, stream
from .frames import Frame
from .loop import run_pass
from .plan import PassPlan, Plan, Request, make_plan

Callback = Callable[[dict[str, Any]], None]
EVENTS = [name for name in vars(hookspecs) if name.startswith("inlay_")]
BOARD = {"image": ("image:source", "image:original"), "mask": ("mask:user",)}


class Run:
    """One run as plugins see it.

    board; backbone; plan; prompts; conds by branch; words[probe]: text token indices;
    x_T[pass, lane]: unit-variance initial noise; finals[pass][lane]: last latents of earlier passes.
    """

    def __init__(
        self,
        session: Session,
        plan: Plan,
        sigmas: Sequence[float] | None,
        noise: Mapping[str, Tensor],
        callback: Callback | None,
    ) -> None:
        self.plan, self.callback, self.hook = plan, callback, session.manager.hook
        self.backbone, self.seed = session.backbone, plan.request.seed
        self.device, self.dtype = session.backbone.device, session.backbone.dtype
        self.prompts, self.size = plan.request.prompt, plan.request.size
        self.board = Board(dict(plan.publishes))
        self.conds, self.words = dict[str, Cond](), dict[str, tuple[int, ...]]()
        self.x_T = dict[tuple[str, str], Tensor]()
        self.generators = dict[tuple[str, str], torch.Generator]()
        self.finals, self.timings = dict[str, dict[str, Tensor]](), dict[str, float]()
        self._session, self._sigmas, self._noise = session, sigmas, noise

    def rng(self, *names: str) -> torch.Generator:
        """This run's generator for a plugin and purpose."""
        return stream(self.seed, *names)

    def noise(self, name: str, shape: Sequence[int]) -> Tensor:
        """Standard normal noise of the stream `name`, or what the caller injected under it."""
        drawn = self._noise.get(name)
        if drawn is None:
            drawn = torch.randn(tuple(shape), generator=self.rng(name))
        return drawn.to(self.device, self.dtype)

    def initial(self, pass_: str, lane: Lane) -> Tensor:
        """x_T of a lane, drawn or injected; its generator goes on to feed the scheduler's noise, in
        the stock pipeline's order."""
        key, given = (pass_, lane.name), self._noise.get(lane.name)
        self.generators[key] = torch.Generator("cpu").manual_seed(lane.seed)
        self.x_T[key] = self.backbone.latent(lane.n, self.size, self.generators[key], given)
        return self.x_T[key]

    def schedule(self, pass_: PassPlan) -> Any:
        """A fresh scheduler with this run's timesteps, or the solver that the pass asked for."""
        base, sigmas = copy.deepcopy(self._session.scheduler), self._sigmas
        self.backbone.set_timesteps(base, self.plan.request.steps, sigmas, self.size)
        return pass_.scheduler(base) if pass_.scheduler else base

    def frames(self, scheduler: Any) -> Callable[[int], Frame]:
        """Frame of an evaluation; tabulated when first asked, so nobody pays who does not ask."""
        table: list[Frame] = []

        def frame_at(i: int) -> Frame:
            for f in () if table else schedulers.tabulate(scheduler):
                alpha, sigma = f.alpha.to(self.device), f.sigma.to(self.device)
                table.append(replace(f, alpha=alpha, sigma=sigma))
            return table[i]

        return frame_at

    def branches(self, step: Step) -> tuple[str, ...]:
        """Branches alive in a step."""
        passes = {p.name: p for p in self.plan.passes}
        return tuple(b.name for b in passes[step.pass_].branches if b.lane in step.lanes)

    def hook_of(self, event: str, owner: str) -> Any:
        """An event for one plugin alone."""
        return self._session.caller(event, owner)


class Session:
    """A pipeline with plugins. pipe: a live diffusers pipeline, a folder, a hub name, "toybox/flux".

    plugins: name -> options, in execution order; a name is a plugin or a preset, a value may be a
    live Plugin. Raises ConfigError and ModelError; PlanConflict when a run is planned.
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
    ) -> None:
        self.folder, self.skip_dead_rows = "", skip_dead_rows
        self.record: dict[str, Any] = {"revision": revision, "offload": offload}
        if isinstance(pipe, str | Path):
            self.record["model"], self.folder = str(pipe), registry.resolve_model(str(pipe))
            pipe = backbones.load(self.folder, dtype, device, offload, revision)
        else:
            self.record["model"] = str(pipe.config.get("_name_or_path") or type(pipe).__name__)
        self.backbone = backbones.adapt(pipe)
        self.scheduler = schedulers.choose(pipe.scheduler, scheduler, self.backbone.flow)
        live = {name: p for name, p in (plugins or {}).items() if isinstance(p, Plugin)}
        options = {name: v for name, v in (plugins or {}).items() if name not in live}
        self.record |= {"plugins": options, "scheduler": type(self.scheduler).__name__}
        listed = config.expand_presets({name: options.get(name) for name in plugins or ()})
        self.plugins = {name: live.get(name) or _build(name, v) for name, v in listed.items()}
        self.manager, self._callers = pluggy.PluginManager("inlay"), dict[tuple[str, str], Any]()
        self.manager.add_hookspecs(hookspecs)
        for name, plugin in reversed(self.plugins.items()):  # pluggy calls the last one first
            plugin.name = name
            self.manager.register(plugin, name)
        self.manager.check_pending()

    def caller(self, event: str, owner: str) -> Any:
        """The hook `event` of one plugin."""
        if (event, owner) not in self._callers:
            others = [plugin for name, plugin in self.plugins.items() if name != owner]
            self._callers[event, owner] = self.manager.subset_hook_caller(event, others)
        return self._callers[event, owner]

    def plan(self, request: Request) -> Plan:
        """Every plugin declares; conflicts raise here. No tensor is made."""
        events = {}
        for event in EVENTS:
            impls = getattr(self.manager.hook, event).get_hookimpls()
            events[event.removeprefix("inlay_")] = tuple(i.plugin_name for i in reversed(impls))

        def declare(name: str, need: Any) -> None:
            self.caller("inlay_declare", name)(need=need)

        return make_plan(self.plugins, declare, events, request, self.backbone)

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
        """Plan and run every pass.

        prompt: {"source", "edit", "negative"}, or the edit prompt. image, mask: a path, a PIL picture
        or `1 c h w` in 0..1. guidance: one scale, or one per lane. size: side or (height, width) px.
        conds: prompt or branch name -> Cond. noise: lane or stream name -> tensor.
        """
        started = time.perf_counter()
        prompts = {"edit": prompt} if isinstance(prompt, str) else dict(prompt)
        pictures = {
            "image": images.as_picture(image, "input.image"),
            "mask": images.as_picture(mask, "input.mask", "L"),
        }
        asked = Experiment(
            prompt=config.Prompt(**prompts),
            guidance=dict(guidance) if isinstance(guidance, Mapping) else guidance,
            size=list(size) if isinstance(size, tuple) else size,
            **{"true_cfg": true_cfg, "n": n, "steps": steps, "seed": seed, **self.record},
        )
        shape = pictures["image"].size[::-1] if pictures["image"] else None
        plan = self.plan(self.request(asked, shape, [k for k, v in pictures.items() if v]))
        run = Run(self, plan, sigmas, noise or {}, callback)
        with Seam({name: self.backbone.modules[name] for name in plan.sites}) as seam:
            self._prepare(run, conds or {}, pictures)
            run.timings["prepare"] = time.perf_counter() - started
            for pass_ in plan.passes:
                begun = time.perf_counter()
                if callback:
                    callback({"kind": "pass", "pass": pass_.name, "steps": steps})
                run.finals[pass_.name] = run_pass(run, pass_, seam)
                run.timings[pass_.name] = time.perf_counter() - begun
        result = self._finish(run)
        run.timings["total"] = time.perf_counter() - started
        asked.device, asked.dtype = run.device.type, str(run.dtype).removeprefix("torch.")
        result.manifest = manifest.build(
            config.to_dict(asked),
            plan=plan.digest,
            weights=manifest.hash_weights(self.folder) if self.folder else "",
            inputs={k: manifest.hash_image(v) for k, v in pictures.items() if v},
            seed=seed,
            device=str(run.device),
            dtype=asked.dtype,
            threads=torch.get_num_threads(),
            timings=run.timings,
        )
        if callback:
            callback({"kind": "done"})
        return result

    def request(
        self, asked: Experiment, picture: tuple[int, int] | None, inputs: Sequence[str]
    ) -> Request:
        """What the plan is made of; picture: (height, width) px of the input."""
        given = tuple(key for kind in inputs for key in BOARD[kind])
        size = self.backbone.fit(asked.size, picture)
        fields = {k: getattr(asked, k) for k in ("steps", "n", "seed", "guidance", "true_cfg")}
        prompts = config.to_dict(asked)["prompt"]
        skip = self.skip_dead_rows
        grid = self.backbone.grid(size)
        return Request(
            prompts, size=size, grid=grid, inputs=given, skip_dead_rows=skip, **fields
        )

    def _prepare(self, run: Run, given: Mapping[str, Any], pictures: Mapping[str, Any]) -> None:
        """Encode each prompt once, find the words of the probes, put the pictures on the board."""
        encoded: dict[str, Cond] = {}
        for branch in (b for p in run.plan.passes for b in p.branches):
            ready = given.get(branch.name, given.get(branch.cond))
            if ready is None and branch.cond not in encoded:
                encoded[branch.cond] = self.backbone.encode_text(run.prompts[branch.cond])
            cond = encoded[branch.cond] if ready is None else ready
            cond = cond if isinstance(cond, Cond) else Cond(**cond)
            pooled = None if cond.pooled is None else cond.pooled.to(run.device, run.dtype)
            embeds = cond.embeds.to(run.device, run.dtype)
            run.conds[branch.name] = replace(cond, embeds=embeds, pooled=pooled)
        for probe in run.plan.probes:
            word = probe.word
            found = text.find(run.conds[probe.branch], word) if isinstance(word, str) else word
            run.words[probe.name] = found
        for kind, picture in pictures.items():
            if picture:
                fitted = picture.resize(run.size[::-1], images.LANCZOS)
                run.board[BOARD[kind][0]] = images.to_tensor(fitted).to(run.device)
                for original in BOARD[kind][1:]:
                    run.board[original] = images.to_tensor(picture)
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
        pictures = {}
        if self.backbone.pipe.vae is not None:
            pictures = {name: self.backbone.decode(x, run.size) for name, x in latents.items()}
        result = Result(pictures, latents, run.board, {})
        run.hook.inlay_final(run=run, result=result)
        self.backbone.pipe.maybe_free_model_hooks()
        run.timings["decode"] = time.perf_counter() - begun
        return result


def _build(name: str, options: Mapping[str, Any] | None) -> Plugin:
    """A plugin by its registered name, its options parsed."""
    where = f"plugins.{name}"
    cls = registry.plugin_class(str((options or {}).get("use", name)), where)
    plugin: Plugin = cls(config.parse_plugin_config(cls, options, where), name)
    return plugin


def _session(exp: Experiment, pipe: Any) -> Session:
    place = {"dtype": exp.dtype, "device": exp.device, "offload": exp.offload}
    return Session(pipe, exp.plugins, exp.scheduler, **place, revision=exp.revision)


def execute(exp: Experiment, callback: Callback | None = None) -> Result:
    """Run an experiment."""
    asked = {k: getattr(exp, k) for k in ("guidance", "true_cfg", "size", "n", "steps", "seed")}
    prompts, pictures = config.to_dict(exp)["prompt"], (exp.input.image, exp.input.mask)
    result = _session(exp, exp.model).run(prompts, *pictures, **asked, callback=callback)
    result.manifest["experiment"] = config.to_dict(exp)
    return result


def plan_experiment(exp: Experiment) -> Plan:
    """The plan of an experiment; no weight is loaded."""
    pipe = backbones.skeleton(registry.resolve_model(exp.model), exp.revision)
    given = {k: v for k, v in vars(exp.input).items() if v}
    shape = images.open_image(given["image"]).size[::-1] if "image" in given else None
    session = _session(exp, pipe)
    return session.plan(session.request(exp, shape, list(given)))


def run(experiment: str, overrides: Sequence[str] = ()) -> Result:
    """`inlay.run("addit", ["prompt.edit=a dog on the grass"])`: a packaged name or a YAML path."""
    return execute(config.load(experiment, overrides))
