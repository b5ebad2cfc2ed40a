"""Session: a pipeline and plugins -> plan -> passes -> Result. `Run` is what plugins see of one run."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pluggy
import torch
from PIL import Image
from torch import Tensor

from . import backbones, config, hookspecs, images, manifest, registry
from .attention import Seam
from .backbones import Backbone
from .board import Board
from .config import Experiment
from .errors import ConfigError, InputError, ModelError
from .events import Cond, Lane, Plugin, Result, Rows, Step, stream
from .frames import Frame, tabulate
from .loop import run_pass
from .plan import Needs, PassPlan, Plan, Request, make_plan

Callback = Callable[[dict[str, Any]], None]
EVENTS = [name for name in vars(hookspecs) if name.startswith("inlay_")]


class Run:
    """One run as plugins see it: plan, board, backbone, conditions, random streams, and what earlier passes ended with.

    x_T[pass, lane]: unit-variance initial noise; finals[pass][lane]: last latents; words[probe]: text token indices.
    """

    def __init__(self, session: Session, plan: Plan, sigmas: list[float] | None, noise: Mapping[str, Tensor], callback: Callback | None) -> None:
        self.plan, self.backbone, self.hook, self.callback = plan, session.backbone, session.manager.hook, callback
        self.device, self.dtype, self.seed = session.backbone.device, session.backbone.dtype, plan.request.seed
        self.board = Board(dict(plan.publishes))
        self.prompts, self.conds, self.words = plan.request.prompt, dict[str, Cond](), dict[str, tuple[int, ...]]()
        self.x_T, self.generators = dict[tuple[str, str], Tensor](), dict[tuple[str, str], torch.Generator]()
        self.finals, self.timings = dict[str, dict[str, Tensor]](), dict[str, float]()
        self._session, self._sigmas, self._noise = session, sigmas, dict(noise)

    @property
    def size(self) -> tuple[int, int]:
        return self.plan.request.size

    def rng(self, *names: str) -> torch.Generator:
        """A generator of this run for one plugin and purpose."""
        return stream(self.seed, *names)

    def noise(self, name: str, shape: Sequence[int]) -> Tensor:
        """Standard normal noise of the stream `name`, or the tensor injected under that name."""
        if name in self._noise:
            return self._noise[name].to(self.device, self.dtype)
        return torch.randn(tuple(shape), generator=self.rng(name), dtype=torch.float32).to(self.device, self.dtype)

    def schedule(self, pass_: PassPlan) -> Any:
        """A fresh scheduler with the timesteps of this run (or the solver the pass asked for)."""
        base = copy.deepcopy(self._session.scheduler)
        self.backbone.set_timesteps(base, self.plan.request.steps, self._sigmas, self.size)
        return pass_.make_scheduler(base) if pass_.make_scheduler else base

    def frames(self, scheduler: Any) -> Callable[[int], Frame]:
        """Frame of evaluation i, tabulated when first asked for: a run without plugins never pays for it."""
        table: list[Frame] = []

        def frame_at(i: int) -> Frame:
            if not table:
                table.extend(replace(f, alpha=f.alpha.to(self.device), sigma=f.sigma.to(self.device)) for f in tabulate(scheduler))
            return table[i]

        return frame_at

    def initial(self, pass_: str, lane: Lane) -> Tensor:
        """x_T of a lane from its own seed, in the order of the stock pipeline: the generator goes on to feed the scheduler."""
        key = (pass_, lane.name)
        self.generators[key] = torch.Generator("cpu").manual_seed(lane.seed)
        self.x_T[key] = self.backbone.latent(lane.n, self.size, self.generators[key], self._noise.get(lane.name))
        return self.x_T[key]

    def branches(self, step: Step) -> tuple[str, ...]:
        """Branches alive in this step."""
        pass_ = next(p for p in self.plan.passes if p.name == step.pass_)
        return tuple(b.name for b in pass_.branches if b.lane in step.lanes)

    def cond(self, branch: str) -> Cond:
        return self.conds[branch]

    def text_length(self, rows: Rows) -> int:
        return next(self.conds[b].embeds.shape[1] for b in rows)

    def hook_of(self, event: str, owner: str) -> Any:
        """The event, for one plugin alone."""
        return self._session.caller(event, owner)


class Session:
    """A pipeline with plugins attached. pipe: a live diffusers pipeline, a folder, a hub name or a name such as "toybox/flux".

    plugins: name -> options, in execution order; names are plugins, presets, or Plugin instances as values.
    Raises ConfigError, ModelError; PlanConflict when a run is planned.
    """

    def __init__(self, pipe: Any, plugins: Mapping[str, Any] | None = None, scheduler: Any = None, *, dtype: str = "float32", device: str = "auto",
                 offload: str = "none", revision: str | None = None, skip_dead_rows: bool = True) -> None:  # fmt: skip
        self.model = pipe if isinstance(pipe, (str, Path)) else str(getattr(pipe.config, "_name_or_path", "") or type(pipe).__name__)
        self.revision, self.skip_dead_rows = revision, skip_dead_rows
        if isinstance(pipe, (str, Path)):
            pipe = backbones.load(registry.resolve_model(str(pipe)), dtype, device, offload, revision)
        self._attach(backbones.adapt(pipe), plugins or {}, scheduler)

    def _attach(self, backbone: Backbone, plugins: Mapping[str, Any], scheduler: Any) -> None:
        self.backbone, self.scheduler = backbone, _scheduler(backbone, scheduler)
        self.options = {name: None if isinstance(v, Plugin) else v for name, v in plugins.items()}
        live = {name: v for name, v in plugins.items() if isinstance(v, Plugin)}
        expanded = config.expand_presets({k: v for k, v in plugins.items() if k not in live}) | live
        self.plugins = {name: v if isinstance(v, Plugin) else _build(name, v) for name, v in expanded.items()}
        self.manager = pluggy.PluginManager("inlay")
        self.manager.add_hookspecs(hookspecs)
        for name, plugin in reversed(self.plugins.items()):  # pluggy calls last registered first
            plugin.name = name
            self.manager.register(plugin, name)
        self.manager.check_pending()
        self._callers: dict[tuple[str, str], Any] = {}

    def caller(self, event: str, owner: str) -> Any:
        if (event, owner) not in self._callers:
            others = [p for name, p in self.plugins.items() if name != owner]
            self._callers[event, owner] = self.manager.subset_hook_caller(event, others)
        return self._callers[event, owner]

    def events(self) -> dict[str, tuple[str, ...]]:
        """Which plugin runs at which event, in order."""
        called = {e.removeprefix("inlay_"): [i.plugin_name for i in getattr(self.manager.hook, e).get_hookimpls()] for e in EVENTS}
        return {event: tuple(reversed(names)) for event, names in called.items()}

    def plan(self, request: Request) -> Plan:
        """Every plugin declares; conflicts raise here. No tensor is made."""
        declare = lambda name, need: self.caller("inlay_declare", name)(need=need)  # noqa: E731
        return make_plan(self.plugins, declare, self.events(), request, self.backbone)

    @torch.no_grad()
    def run(self, prompt: str | Mapping[str, str] = "", image: Any = None, mask: Any = None, guidance: float | Mapping[str, float] = 3.5,
            true_cfg: float = 1.0, size: Any = None, n: int = 1, steps: int = 28, sigmas: Sequence[float] | None = None, seed: int = 0,
            conds: Mapping[str, Any] | None = None, noise: Mapping[str, Tensor] | None = None, callback: Callback | None = None) -> Result:  # fmt: skip
        """Run every pass. See DESIGN 4 for the order of events.

        prompt: {"source", "edit", "negative"} or the edit prompt; image, mask: path, PIL or `1 c h w` in 0..1; guidance, one or per lane;
        size: side or (height, width) px; conds: prompt key or branch -> Cond (or {"embeds", "pooled", "tokens"}); noise: lane or stream -> tensor.
        """
        started = time.perf_counter()
        prompts = {"negative": "", "source": "", **({"edit": prompt} if isinstance(prompt, str) else prompt)}
        pictures = {"image": _picture(image, "input.image"), "mask": _picture(mask, "input.mask", "L")}
        shape = pictures["image"].size[::-1] if pictures["image"] else None
        request = self.request(prompts, size, shape, steps, n, seed, guidance, true_cfg, pictures)
        plan = self.plan(request)
        run = Run(self, plan, None if sigmas is None else list(sigmas), noise or {}, callback)
        with Seam({name: self.backbone.modules[name] for name in plan.sites}) as seam:
            self._condition(run, conds or {})
            self._look(run, pictures)
            run.hook.inlay_prepare(run=run)
            run.timings["prepare"] = time.perf_counter() - started
            for pass_ in plan.passes:
                begun = time.perf_counter()
                if callback:
                    callback({"kind": "pass", "pass": pass_.name, "steps": steps})
                run.finals[pass_.name] = run_pass(run, pass_, seam)
                run.timings[pass_.name] = time.perf_counter() - begun
        result = self._finish(run, {k: manifest.hash_image(v) for k, v in pictures.items() if v})
        result.manifest["timings"]["total"] = time.perf_counter() - started
        if callback:
            callback({"kind": "done"})
        return result

    def request(self, prompts: Mapping[str, str], size: Any, picture: tuple[int, int] | None, steps: int, n: int, seed: int,
                guidance: Any, true_cfg: float, inputs: Mapping[str, Any]) -> Request:  # fmt: skip
        """The plan's question, with the picture's size settled."""
        checked = Experiment(steps=steps, n=n, seed=seed, guidance=dict(guidance) if isinstance(guidance, Mapping) else guidance, true_cfg=true_cfg)
        keys = {"image": ("image:source", "image:original"), "mask": ("mask:user",)}
        given = tuple(key for kind, value in inputs.items() if value is not None for key in keys[kind])
        return Request(dict(prompts), steps, self.backbone.fit(size, picture), n, seed, checked.guidance, true_cfg, given, self.skip_dead_rows)

    def _condition(self, run: Run, given: Mapping[str, Any]) -> None:
        """Encode each prompt once; find the words that probes ask for."""
        encoded: dict[str, Cond] = {}
        for branch in (b for p in run.plan.passes for b in p.branches):
            ready = given.get(branch.name, given.get(branch.cond))
            if ready is not None:
                cond = ready if isinstance(ready, Cond) else Cond(**ready)
                pooled = None if cond.pooled is None else cond.pooled.to(run.device, run.dtype)
                run.conds[branch.name] = replace(cond, embeds=cond.embeds.to(run.device, run.dtype), pooled=pooled)
            else:
                if branch.cond not in encoded:
                    encoded[branch.cond] = self.backbone.encode_text(run.prompts[branch.cond])
                run.conds[branch.name] = encoded[branch.cond]
        for probe in run.plan.probes:
            run.words[probe.name] = run.conds[probe.branch].find(probe.word) if isinstance(probe.word, str) and probe.word else tuple(probe.word)  # type: ignore[arg-type]

    def _look(self, run: Run, pictures: Mapping[str, Image.Image | None]) -> None:
        """The input pictures on the board: at the model's size, and as they came."""
        height, width = run.size
        if pictures["image"]:
            run.board["image:original"] = images.to_tensor(pictures["image"])
            run.board["image:source"] = images.to_tensor(pictures["image"].resize((width, height), Image.Resampling.LANCZOS)).to(run.device)
        if pictures["mask"]:
            run.board["mask:user"] = images.to_tensor(pictures["mask"].resize((width, height), Image.Resampling.BILINEAR)).to(run.device)

    def _finish(self, run: Run, inputs: dict[str, str]) -> Result:
        """Decode what is kept, fold `final`, write the record."""
        begun, request = time.perf_counter(), run.plan.request
        latents = {lane.name: run.finals[p.name][lane.name] for p in run.plan.passes for lane in p.lanes
                   if lane.keep and lane.name in run.finals[p.name]}  # fmt: skip
        for name, latent in latents.items():
            if not torch.isfinite(latent).all():
                raise ModelError(f"lane {name} ended with values that are not finite", where="final",
                                 fix="Use dtype=float32, or look at the plugins that write latents.")  # fmt: skip
        decoder = getattr(self.backbone.pipe, "vae", None)
        result = Result({k: self.backbone.decode(v, run.size) for k, v in latents.items()} if decoder else {}, latents, run.board, {})
        run.hook.inlay_final(run=run, result=result)
        self.backbone.pipe.maybe_free_model_hooks()
        run.timings["decode"] = time.perf_counter() - begun
        experiment = Experiment(model=str(self.model), revision=self.revision, scheduler=type(self.scheduler).__name__, steps=request.steps,
                                dtype=str(run.dtype).removeprefix("torch."), device=run.device.type, seed=request.seed, n=request.n,
                                guidance=request.guidance, true_cfg=request.true_cfg, size=list(request.size),
                                prompt=config.Prompt(**{k: v for k, v in request.prompt.items() if k in ("source", "edit", "negative")}),
                                plugins=dict(self.options))  # fmt: skip
        weights = manifest.hash_weights(registry.resolve_model(str(self.model))) if Path(str(self.model)).is_dir() or self.model in registry.models() else ""
        result.manifest.update(manifest.build(config.to_dict(experiment), plan=run.plan.digest, weights=weights, inputs=inputs, seed=request.seed,
                                              device=str(run.device), dtype=str(run.dtype), threads=torch.get_num_threads(), timings=run.timings))  # fmt: skip
        return result


def _build(name: str, options: Mapping[str, Any] | None) -> Plugin:
    where = f"plugins.{name}"
    cls = registry.plugin_class(str((options or {}).get("use", name)), where)
    plugin: Plugin = cls(config.parse_plugin_config(cls, options, where), name)
    return plugin


def _scheduler(backbone: Backbone, wanted: Any) -> Any:
    """The pipeline's own scheduler, an instance, or a diffusers class by name with the pipeline's configuration."""
    own = backbone.pipe.scheduler
    if wanted is None or wanted == type(own).__name__:
        return own
    if isinstance(wanted, str):
        import diffusers

        known = [n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith("Flax")]
        if wanted not in known:
            raise ConfigError(f"no scheduler '{wanted}'", where="scheduler", fix=config.suggest(wanted, known))
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if backbone.flow and not wanted.startswith("FlowMatch") else {}
        wanted = getattr(diffusers, wanted).from_config(own.config, **flow)
    flows = hasattr(wanted, "scale_noise") or bool(getattr(wanted.config, "use_flow_sigmas", False))
    if flows != backbone.flow:
        kind = "a flow" if backbone.flow else "a diffusion"
        raise ConfigError(f"{type(wanted).__name__} does not solve {kind} model", where="scheduler", fix=f"Use {type(own).__name__}.")
    return wanted


def _picture(value: Any, where: str, mode: str = "RGB") -> Image.Image | None:
    """A path, PIL picture or tensor `1 c h w` in 0..1 as a PIL picture."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        value = images.to_pil(value)[0]
    elif isinstance(value, (str, Path)):
        value = images.open_image(value, where)
    if not isinstance(value, Image.Image):
        raise InputError(f"{type(value).__name__} is no picture", where=where, fix="Give a path, a PIL image or a tensor.")
    return value.convert(mode)


def _from_experiment(exp: Experiment, pipe: Any) -> Session:
    session = Session(pipe, exp.plugins, exp.scheduler, dtype=exp.dtype, device=exp.device, offload=exp.offload, revision=exp.revision)
    session.model = exp.model
    return session


def execute(exp: Experiment, callback: Callback | None = None) -> Result:
    """Run an experiment from configuration to Result."""
    session = _from_experiment(exp, exp.model)
    prompts = {k: v for k, v in config.to_dict(exp)["prompt"].items()}
    result = session.run(prompts, exp.input.image, exp.input.mask, exp.guidance, exp.true_cfg, exp.size, exp.n, exp.steps, None, exp.seed, callback=callback)
    result.manifest["experiment"] = config.to_dict(exp)
    return result


def plan_experiment(exp: Experiment) -> Plan:
    """The plan of an experiment without loading a weight."""
    session = _from_experiment(exp, backbones.skeleton(registry.resolve_model(exp.model), exp.revision))
    picture = images.open_image(exp.input.image).size[::-1] if exp.input.image else None
    prompts = config.to_dict(exp)["prompt"]
    inputs = {"image": exp.input.image, "mask": exp.input.mask}
    return session.plan(session.request(prompts, exp.size, picture, exp.steps, exp.n, exp.seed, exp.guidance, exp.true_cfg, inputs))


def run(experiment: str, overrides: Sequence[str] = ()) -> Result:
    """`inlay.run("addit", ["prompt.edit=a dog on the grass", "seed=3"])`: a packaged experiment by name, or a YAML file by path."""
    return execute(config.load(experiment, overrides))
