"""The seam: which attention module is running (module hooks), what it computes (SDPA dispatcher).

Outside the subscribed sites of a running session every call passes straight through; the last
session to close gives torch its function back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.utils.checkpoint import checkpoint

from inlay_config.errors import ModelError, SeamMissed

from .algebra import Held
from .lowering import SiteProgram


class _Local(threading.local):
    """running: (site, what was running around it) of this thread, and nothing else."""

    running: tuple[_Site, Any] | None

    def __init__(self) -> None:  # dynamo guards on an attribute of this thread's own, not a class's
        self.running = None


class _Site:
    """What the hooks of one module hold: code compiled for one block serves its equals, since no
    name is in it, and a thread that recomputes a checkpoint finds the same program."""

    def __init__(self, name: str, seam: Seam) -> None:
        self.name, self.seam = name, seam
        self.program: SiteProgram | None = None
        self.hit = False


_local = _Local()
_lock = threading.Lock()
_entered: list[Seam] = []  # of all threads
_sessions = 0
_original: Any = None
_wrapped = False  # somebody wrapped our dispatcher: installing again would call in circles


def _dispatch(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Torch's own parameter names, since diffusers calls with keywords."""
    running = _local.running
    program = running[0].program if running else None
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if running is None or program is None:
        out: Tensor = _original(query, key, value, attn_mask, dropout_p, is_causal, **options)
        return out
    site = running[0]
    site.hit = True
    watch = None if torch.compiler.is_compiling() else site.seam.watch
    call = program if watch is None else watch(site.name, program)
    return call(_original, query, key, value, attn_mask, dropout_p, is_causal, **options)


class Seam:
    """Context manager around a run: hooks on `modules` (site -> module), none when there are none.
    programs: what each site computes in the next model call of this thread; without one it runs
    untouched, as under a seam that was entered later. watch(site, program): what is called instead,
    to time it. compiled: the model is compiled under these hooks: numbers are given as tensors.
    """

    def __init__(self, modules: Mapping[str, nn.Module], compiled: bool = False) -> None:
        self.modules, self.compiled = modules, compiled
        self.watch: Callable[[str, SiteProgram], Callable[..., Tensor]] | None = None
        self.thread = threading.get_ident()
        self._sites = {name: _Site(name, self) for name in modules}
        self._stack = ExitStack()

    @property
    def programs(self) -> Mapping[str, SiteProgram]:
        """Read only; assigning a mapping exchanges all of them."""
        return MappingProxyType({n: s.program for n, s in self._sites.items() if s.program})

    @programs.setter
    def programs(self, programs: Mapping[str, SiteProgram]) -> None:
        for name, site in self._sites.items():
            program, site.hit = programs.get(name), False
            if isinstance(program, SiteProgram):
                program = program.with_tensors() if self.compiled else program.reduced()
            site.program = program

    def checkpoint(self, block: Callable[..., Any], *args: Any) -> Any:
        """torch's checkpoint of `block(*args)`, which recomputes with the programs of now, in
        whatever thread and however late: `model.enable_gradient_checkpointing(seam.checkpoint)`."""
        held = [site.program for site in self._sites.values()]

        def again(*args: Any) -> Any:
            now = self._exchange(held)
            try:
                return block(*args)
            finally:
                self._exchange(now)

        call = block if torch.compiler.is_compiling() else again  # a graph holds what it needs
        return checkpoint(call, *args, use_reentrant=False)

    def _exchange(self, programs: Sequence[SiteProgram | None]) -> list[SiteProgram | None]:
        """Put the programs of all sites in place; returns those that were."""
        before, self.thread = [site.program for site in self._sites.values()], threading.get_ident()
        for site, program in zip(self._sites.values(), programs, strict=True):
            site.program = program
        return before

    def __enter__(self) -> Seam:
        _entered.append(self)
        self._stack.callback(_entered.remove, self)
        if self.modules:
            _install()
            self._stack.callback(_uninstall)
        for name, module in self.modules.items():
            self._hook(name, module)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        while _local.running and _local.running[0].seam is self:  # a forward that raised
            _local.running = _local.running[1]

    def check(self) -> None:
        """After a model call. Raises SeamMissed for a site whose program was not reached in it."""
        for name in (n for n, s in self._sites.items() if s.program is not None and not s.hit):
            processor = type(getattr(self.modules[name], "processor", None)).__name__
            problem = f"its processor {processor} never called scaled_dot_product_attention"
            fix = 'Call model.set_attention_backend("native"), or use AttnProcessor2_0.'
            raise SeamMissed(problem, where=f"site {name}", fix=fix)
        for site in self._sites.values():
            site.hit = False

    def _acts(self) -> bool:
        """Whether a call is this seam's: of its thread, and of no run inside a hook of its run."""
        return self is next((s for s in _entered[::-1] if s.thread == threading.get_ident()), None)

    def _hook(self, name: str, module: nn.Module) -> None:
        """Mark the site while its forward runs, also when that forward raises; sites may nest."""
        site = self._sites[name]

        def enter(*_: Any) -> None:
            if torch.compiler.is_compiling() or self._acts():
                _local.running = (site, _local.running)

        def leave(*_: Any) -> None:
            if _local.running and _local.running[0] is site:
                _local.running = _local.running[1]

        self._stack.callback(module.register_forward_pre_hook(enter).remove)
        # dynamo guards on the number of a hook that is always called, another one in every run
        leaving = {"always_call": not self.compiled, "prepend": True}  # last in, first out
        self._stack.callback(module.register_forward_hook(leave, **leaving).remove)


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold an attention processor, by path: what a backbone may offer as sites.
    Raises ModelError for a compiled model: its code would not see the hooks of a session."""
    named = dict(model.named_modules())
    for module in named.values():
        if isinstance(module, OptimizedModule) or module._compiled_call_impl is not None:
            problem = f"{type(model).__name__} is compiled already, and would not see its edits"
            fix = "Give it uncompiled; Session(pipe, plugins, compile=True) compiles it with them."
            raise ModelError(problem, where="model", fix=fix)
    return {name: m for name, m in named.items() if hasattr(m, "processor") and hasattr(m, "heads")}


def project_kv(site: Any, hidden: Tensor) -> Held:
    """Keys and values `b h m d` that an attention module makes of other hidden states `b m c`, such
    as a reference network's, by its own weights. For modules that rotate nothing (a U-Net's)."""
    split = "b m (h d) -> b h m d"
    k, v = (rearrange(f(hidden), split, h=site.heads) for f in (site.to_k, site.to_v))
    return Held(k=k if site.norm_k is None else site.norm_k(k), v=v)


def _install() -> None:
    global _sessions, _original, _wrapped
    with _lock:
        reachable = _wrapped and F.scaled_dot_product_attention is not _original
        if _sessions == 0 and not reachable:
            _original, _wrapped = F.scaled_dot_product_attention, False
            F.scaled_dot_product_attention = _dispatch
        _sessions += 1


def _uninstall() -> None:
    global _sessions, _wrapped
    with _lock:
        _sessions -= 1
        if _sessions == 0:
            _wrapped = F.scaled_dot_product_attention is not _dispatch
            if not _wrapped:
                F.scaled_dot_product_attention = _original
