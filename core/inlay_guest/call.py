"""One call of a pipeline, as plugins see it: the loop's events, where the pipeline passes them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inlay import Cond, InputError, ModelError, PluginError, Result, Rows, Run, Step
from inlay.backbones import levels, schedulers, text
from inlay.loop import collect_edits, observe, site_programs
from inlay_attention import AttnEdits, Seam, cat
from inlay_config import images

from .naming import Prompts, batch

if TYPE_CHECKING:
    from .guest import Guest


NO_PROMPT = Cond(torch.zeros(1, 0, 0))


class _Unknown(dict[str, Tensor]):
    """Latents before the first `scheduler.step`, which no guest sees; `owner` asks for them."""

    owner = ""

    def __missing__(self, lane: str) -> Tensor:
        raise self._refused("reads")

    def __setitem__(self, lane: str, value: Tensor) -> None:
        raise self._refused("writes")

    def _refused(self, what: str) -> PluginError:
        problem = f"{self.owner or 'a plugin'} {what} latents before the first step"
        fix = "A guest sees what scheduler.step returned: act later, or use inlay.Session."
        return PluginError(problem, where="step 0", fix=fix)


class Call:
    """State of one call. thread: whose it is; steps: that its loop will make; size: (height, width)
    of its picture; run: from the first model call on; step: the evaluation that goes on, None
    before the first and after the last; inside: plugins are being called; done: every step is
    made; finished: `final` was called."""

    def __init__(self, guest: Guest, thread: int = 0) -> None:
        self.guest, self.thread, self.prompts = guest, thread, Prompts(guest.pipe)
        self.steps, self.size, self.checking, self.inside = 0, guest.size, False, False
        self.run: Run | None = None
        self.step: Step | None = None
        self.done = self.finished = False
        self.latent: Tensor | None = None
        self._rows, self._edits = Rows(), dict[str, AttnEdits]()
        self._seam = Seam({})

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Plugins are called: what they do with the pipeline is not the call's."""
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def before_model(self, arguments: Mapping[str, Any]) -> None:
        """Plan at the first model call, collect edits at the first of every step, name the rows."""
        if self.run is None:
            self._begin(arguments)
        if self.step is None or self.run is None:
            return
        try:
            self._rows = self.prompts.name(arguments)
        except ModelError:
            if self._seam.modules:
                raise
        for branch in self._rows if self._seam.modules else ():
            length = self.run.conds[branch].embeds.shape[1]
            self.guest.backbone.look(arguments, length, self.run.size)
        self._edits = self._edits or collect_edits(self.run, self.run.plan.passes[-1], self.step)
        self._seam.programs = site_programs(self.run, self.step, self._rows, self._edits)

    def after_model(self, output: Any) -> None:
        """output: what the model returned, None where it raised."""
        try:
            if output is not None:
                self._seam.check()
        finally:
            self._seam.programs = {}
        predicted = output[0] if isinstance(output, tuple) else getattr(output, "sample", None)
        if self.step is not None and isinstance(predicted, Tensor):
            self.step.preds.update({b: predicted[rows] for b, rows in self._rows.items()})

    def solve(self, solver: Callable[[Tensor], Any], output: Tensor, t: Any, x: Tensor) -> Any:
        """`scheduler.step` as `solver`, between `denoised` and `post_step`; the next step's
        `pre_step` comes with it, since nothing else passes by before the next model call."""
        run, step = self.run, self.step
        if run is None or step is None:
            raise ModelError("the scheduler steps before the model is called", where="scheduler")
        if float(t) != float(step.t):
            problem = f"evaluation {step.eval} is at timestep {float(t):g}, not {float(step.t):g}"
            fix = "This pipeline steps in an order of its own: use inlay.Session."
            raise ModelError(problem, where="scheduler", fix=fix)
        step.x, step.output = {"edit": x}, {"edit": output}
        run.hook.inlay_denoised(run=run, step=step)
        if step.x0.written:
            written = step.frame.pred(step.x0["edit"], x).to(output.dtype)
            output = cat([written, output[:, written.shape[1] :]], 1)
        stepped = solver(output)
        following = stepped[0] if isinstance(stepped, tuple) else stepped.prev_sample
        step.x_next["edit"] = following
        run.hook.inlay_post_step(run=run, step=step)
        observe(run, step)
        self._edits, self._rows = {}, Rows()
        self._go_to(step.eval + 1, dict(step.x_next))
        self.latent = self.step.x["edit"] if self.step else step.x_next["edit"]
        if self.latent is following:
            return stepped
        latent = self.latent.to(following.dtype)
        if isinstance(stepped, tuple):
            return (latent, *stepped[1:])
        stepped.prev_sample = latent
        return stepped

    def _begin(self, arguments: Mapping[str, Any]) -> None:
        """Plan what is known now: steps, size, rows, prompts; then `prepare` and `begin`."""
        guest, backbone, prompts = self.guest, self.guest.backbone, self.prompts
        scheduler, first = guest.pipe.scheduler, next(iter(arguments.values()))
        own = prompts.rows.get("edit/text") or [first[0]] * batch(arguments)
        backbone.guided = "edit/null" in prompts.rows
        if self.size is None and isinstance(first, Tensor) and first.dim() > 3:
            pixels = int(getattr(guest.pipe, "vae_scale_factor", 1))
            self.size = first.shape[-2] * pixels, first.shape[-1] * pixels
        if self.size is None:
            fix = "Call attach(..., size=(height, width))."
            raise ModelError("the size of the picture cannot be told", where="size", fix=fix)
        if guest.attends:
            named = prompts.name(arguments)
            conds = {b: prompts.cond(b) if b in prompts.rows else NO_PROMPT for b in named}
            backbone.look(arguments, next(iter(conds.values())).embeds.shape[1], self.size)
        said = {"edit": prompts.text.get("edit/text", "")}
        said["negative"] = prompts.text.get("edit/null", "")
        plan = guest.decide(self.steps, self.size, len(own), said)
        run = Run(guest.session, plan, None)
        for branch in plan.passes[-1].branches:
            known = branch.name in prompts.rows
            run.conds[branch.name] = prompts.cond(branch.name) if known else NO_PROMPT
        for name, asked in plan.words.items():
            run.words[name] = self._find(*asked)
        run.board.update(images.on_board(guest.pictures, run.size, run.device))
        self._seam = Seam({name: backbone.modules[name] for name in plan.sites})
        if plan.sites:
            self._seam.__enter__()
        self._tabulate(scheduler)
        self.run = run
        run.hook.inlay_prepare(run=run)
        unknown = _Unknown()
        for owner in plan.events["begin"]:
            unknown.owner = owner
            run.hook_of("inlay_begin", owner)(run=run, pass_="edit", x=unknown)
        self._go_to(0, unknown)

    def _tabulate(self, scheduler: Any) -> None:
        """Which of the scheduler's evaluations the loop makes: the last ones (img2img begins late),
        and which step each belongs to."""
        every, order = scheduler.timesteps, getattr(scheduler, "order", 1)
        total = int(getattr(scheduler, "num_inference_steps", None) or len(every) // order)
        self._start = max(total - self.steps, 0) * order
        still = copy.copy(scheduler)  # as if it had not begun, and without our layer on it
        vars(still).pop("step", None)
        for name in ("_begin_index", "_step_index"):
            if hasattr(still, name):
                setattr(still, name, None)
        self._frame_at = levels.frames(still, self.guest.backbone.device)
        self._timesteps = every[self._start :]
        late = copy.copy(still)
        late.timesteps = self._timesteps
        self._index_of = schedulers.steps_of(late, self.steps)

    def _go_to(self, i: int, x: dict[str, Tensor]) -> None:
        """The evaluation i of this loop, folded by `pre_step`; None after the last."""
        assert self.run is not None
        if i == len(self._timesteps):
            self.step, self.done = None, True
            self._seam.__exit__()
            return
        index, last = self._index_of[i], self._index_of[i : i + 2] != [self._index_of[i]] * 2
        t, frame_at = self._timesteps[i], lambda k: self._frame_at(self._start + k)
        total, run = self.steps, self.run
        self.step = Step("edit", index, i, total, t, last, ("edit",), frame_at, x)
        for owner in run.plan.events["pre_step"]:
            if isinstance(x, _Unknown):
                x.owner = owner
            run.hook_of("inlay_pre_step", owner)(run=run, step=self.step)

    def _find(self, branch: str, word: str | tuple[int, ...], where: str) -> tuple[int, ...]:
        """Text tokens of a word in the prompt of a branch, the same for all of its rows."""
        if not isinstance(word, str):
            return word
        rows, tokens = self.prompts.rows.get(branch, []), self.prompts.tokens.get(branch)
        problem = ""
        if not tokens:
            problem = (
                f"{word!r} cannot be found: the call was given embeddings, or has no tokenizer"
            )
        elif any(not torch.equal(row, rows[0]) for row in rows):
            problem = f"{word!r} is looked for in one prompt, and the call has several"
        if problem:
            raise InputError(problem, where="prompt", fix="Call the pipeline with one prompt.")
        return text.find(self.prompts.cond(branch), word, where)

    def pictures(self, process: Callable[..., Any], image: Tensor, **how: Any) -> Any:
        """`postprocess` with `final` in it, in the form that the caller asked for."""
        form = how.pop("output_type", "pil")
        if form == "latent":
            return process(image, output_type=form, **how)
        plain = process(image, output_type="pt", **how)
        result = self.finish({"edit": plain})
        if result.images["edit"] is plain:
            return process(image, output_type=form, **how)
        edited, processor = result.images["edit"], self.guest.pipe.image_processor
        if form == "pt":
            return edited
        array = processor.pt_to_numpy(edited)
        return array if form == "np" else processor.numpy_to_pil(array)

    def finish(self, pictures: dict[str, Tensor]) -> Result:
        """`final`, once; without pictures where the call gives latents."""
        assert self.run is not None and self.latent is not None
        self.finished = True
        result = self.guest.result = Result(pictures, {"edit": self.latent}, self.run.board)
        self.run.hook.inlay_final(run=self.run, result=result)
        return result

    def close(self, finish: bool) -> None:
        """Nothing of it acts any more. finish: call `final` if all went well and nobody did."""
        self.thread = 0
        self._seam.__exit__()
        if finish and self.done and not self.finished:
            self.finish({})
