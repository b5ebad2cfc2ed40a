"""Plugins inside an unmodified call of any diffusers pipeline.

The pipeline owns the loop; a guest stands where it passes by: `check_inputs` (a call begins),
`encode_prompt` (whose rows are whose), `progress_bar` (how many steps), the denoiser (attention),
`scheduler.step` (latents), `image_processor.postprocess` (pictures). Between calls it does nothing.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from inlay import Plan, PlanConflict, Result, Session
from inlay.plan import Request
from inlay_config import images
from inlay_config.config import Experiment, Prompt

from .backbone import Tried, visit
from .call import Call
from .patches import layer
from .refusal import GUEST, refuse

_attached: list[Guest] = []


class Guest:
    """Lets plugins act in every call of `pipe` from now on, until `detach` or the end of `with`.

    plugins, image, mask, resolve: as of a Session; seed: of the noise that plugins draw. prompt,
    steps, size (height, width): told where the call does not tell; with steps, windows are checked
    at once. Raises PlanConflict for what only a session can do, ConfigError and ModelError.

    plan: the latest, None for a model that is tried in its first call; result: of the latest call.
    """

    def __init__(
        self,
        pipe: Any,
        plugins: Mapping[str, Any],
        prompt: str | Mapping[str, str] | None = None,
        *,
        seed: int = 0,
        image: Any = None,
        mask: Any = None,
        steps: int | None = None,
        size: tuple[int, int] | None = None,
        resolve: Sequence[Mapping[str, str]] = (),
    ) -> None:
        self.pipe, self.backbone = pipe, visit(pipe)
        self.session = Session(self.backbone, plugins, resolve=resolve)
        self.seed, self.size, self.resolve = seed, size, [dict(rule) for rule in resolve]
        self.prompt = {"edit": prompt} if isinstance(prompt, str) else dict(prompt or {})
        self.pictures = images.as_pictures(image=image, mask=mask)
        self.result: Result | None = None
        self.plan: Plan | None = None
        most = steps or int(getattr(pipe.scheduler.config, "num_train_timesteps", 1000))
        near = size or self.backbone.native_size
        inputs = tuple(key for kind in self.pictures for key in images.BOARD[kind])
        request = Request({"edit": ""}, most, near, self.backbone.grid(near), inputs=inputs)
        self.attends = refuse(self.session, request, GUEST)
        if not isinstance(self.backbone, Tried):
            self.decide(most, near, 1, {})
        self._signature = inspect.signature(type(self.backbone.denoiser).forward)
        self._stack, self._call = ExitStack(), Call(self)
        self._denoiser = self.backbone.denoiser
        if self.attends:
            self._meet()
        self._attach()

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._leave(finish=kind is None)

    def detach(self) -> None:
        """Take everything back; a second time does nothing."""
        self._leave(finish=True)

    @property
    def board(self) -> Mapping[str, Any]:
        """What plugins published in the latest call."""
        return self.result.board if self.result else {}

    def decide(self, steps: int, size: tuple[int, int], n: int, prompt: Mapping[str, str]) -> Plan:
        """The plan of a call. Raises what a session's planning raises."""
        said = Prompt(**{**prompt, **self.prompt})
        told: dict[str, Any] = {"seed": self.seed, "resolve": self.resolve}
        asked = Experiment(prompt=said, steps=steps, size=list(size), n=n, **told)
        self.plan = self.session.plan(asked, None, list(self.pictures))
        return self.plan

    def _meet(self) -> None:
        """Raises PlanConflict where another guest edits this model's attention: what two lists of
        plugins make of it is decided in one plan only."""
        for other in _attached:
            if other is not self and other._denoiser is self._denoiser and other.attends:
                problem, fix = "two guests edit its attention", "Hand all plugins to one `attach`."
                raise PlanConflict(problem, where=type(self._denoiser).__name__, fix=fix)

    def _attach(self) -> None:
        """Stand at every place that this pipeline has."""
        places: list[tuple[Any, str, Callable[..., Any]]] = [
            (self.pipe, "check_inputs", self._check_inputs),
            (self.pipe, "encode_prompt", self._encode_prompt),
            (self.pipe, "prepare_latents", self._prepare_latents),
            (self.pipe, "progress_bar", self._progress_bar),
            (self.pipe, "run_safety_checker", self._run_safety_checker),
            (self.pipe.scheduler, "step", self._step),
            (getattr(self.pipe, "image_processor", None), "postprocess", self._postprocess),
        ]
        for owner, name, stand in places:
            if hasattr(owner, name):
                self._stack.callback(layer(owner, name, stand))
        enter = self._denoiser.register_forward_pre_hook(self._enter, with_kwargs=True)
        leave = self._denoiser.register_forward_hook(self._exit, always_call=True)
        self._stack.callback(enter.remove)
        self._stack.callback(leave.remove)
        _attached.append(self)
        self._stack.callback(_attached.remove, self)

    def _leave(self, finish: bool) -> None:
        with self._stack:
            self._call.close(finish)

    def _ours(self) -> bool:
        """Whether a call goes on, in this thread: others may use the same model meanwhile, and so
        may plugins inside their events."""
        return self._call.thread == threading.get_ident() and not self._call.inside

    def _preparing(self, begins: bool) -> bool:
        """Whether a call is on its way to its loop; begins: one begins here if none does."""
        if begins and not self._call.inside and (self._call.run or not self._ours()):
            self._call.close(finish=True)
            self._call = Call(self, thread=threading.get_ident())
        return self._ours() and not self._call.run

    def _check_inputs(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._call.inside:
            self._call.close(finish=True)
        self._preparing(begins=True)
        return call(*args, **kwargs)

    def _encode_prompt(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._preparing(begins=not hasattr(self.pipe, "check_inputs")):
            return self._call.prompts.record(call, *args, **kwargs)
        return call(*args, **kwargs)

    def _prepare_latents(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._preparing(begins=not hasattr(self.pipe, "check_inputs")):
            given = inspect.signature(call).bind(*args, **kwargs).arguments
            sides = given.get("height"), given.get("width")
            if isinstance(sides[0], int) and isinstance(sides[1], int):
                self._call.size = sides[0], sides[1]
        return call(*args, **kwargs)

    def _progress_bar(
        self, call: Callable[..., Any], iterable: Any = None, total: int | None = None
    ) -> Any:
        if self._preparing(begins=True):
            order = getattr(self.pipe.scheduler, "order", 1)
            self._call.steps = len(iterable) // order if total is None else total
        return call(iterable, total)

    def _enter(self, module: Any, args: Any, kwargs: Any) -> None:
        if self._ours() and self._call.steps:
            arguments = self._signature.bind(module, *args, **kwargs).arguments
            extra = arguments.pop("kwargs", {})
            arguments.pop("self")
            with self._call.acting():
                self._call.before_model({**arguments, **extra})

    def _exit(self, module: Any, args: Any, output: Any) -> None:
        if self._ours() and self._call.run:
            self._call.after_model(output)

    def _step(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not (self._ours() and self._call.steps) or self._call.done:
            return call(*args, **kwargs)
        bound = inspect.signature(call).bind(*args, **kwargs)
        first, *others = list(bound.arguments)[:3]

        def solver(output: Tensor) -> Any:
            bound.arguments[first] = output
            return call(*bound.args, **bound.kwargs)

        t, x = (bound.arguments[name] for name in others)
        with self._call.acting():
            return self._call.solve(solver, bound.arguments[first], t, x)

    def _run_safety_checker(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """It makes pictures of its own, which are nobody's."""
        self._call.checking = True
        try:
            return call(*args, **kwargs)
        finally:
            self._call.checking = False

    def _postprocess(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        asked = not (self._call.checking or self._call.finished)
        if not (self._ours() and self._call.done and asked):
            return call(*args, **kwargs)
        given = inspect.signature(call).bind(*args, **kwargs).arguments
        with self._call.acting():
            return self._call.pictures(call, given.pop("image"), **given)
