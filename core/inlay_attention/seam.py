"""The seam: which attention module is running (module hooks), what it computes (SDPA dispatcher).

Outside the subscribed sites of a running session every call passes straight through; the last
session to close gives torch its function back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from inlay_config.errors import SeamMissed

from .lowering import SiteProgram

_local = threading.local()  # .running: (seam, site) of this thread, and nothing else
_lock = threading.Lock()
_sessions = 0
_original: Any = None
_wrapped = False  # somebody wrapped our dispatcher: installing again would call in circles


def _dispatch(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Torch's own parameter names, since diffusers calls with keywords."""
    running: tuple[Seam, str] | None = getattr(_local, "running", None)
    program = running[0].programs.get(running[1]) if running else None
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if running is None or program is None:
        out: Tensor = _original(query, key, value, attn_mask, dropout_p, is_causal, **options)
        return out
    running[0].hit.add(running[1])
    watch = running[0].watch
    call = program if watch is None else watch(running[1], program)
    return call(_original, query, key, value, attn_mask, dropout_p, is_causal, **options)


class Seam:
    """Context manager around a run: hooks on `modules` (site -> module), none when there are none.
    programs: what each site computes in the next model call; a site without one runs untouched.
    watch(site, program): what is called instead, to time it.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.programs, self.hit = dict[str, SiteProgram](), set[str]()
        self.watch: Callable[[str, SiteProgram], Callable[..., Tensor]] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Seam:
        if self.modules:
            _install()
            self._stack.callback(_uninstall)
        for name, module in self.modules.items():
            self._hook(name, module)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def check(self) -> None:
        """After a model call. Raises SeamMissed for a site whose program was not reached in it."""
        for name in self.programs.keys() - self.hit:
            processor = type(getattr(self.modules[name], "processor", None)).__name__
            problem = f"its processor {processor} never called scaled_dot_product_attention"
            fix = 'Call model.set_attention_backend("native"), or use AttnProcessor2_0.'
            raise SeamMissed(problem, where=f"site {name}", fix=fix)
        self.hit.clear()

    def _hook(self, name: str, module: nn.Module) -> None:
        """Mark the site while its forward runs, also when that forward raises; sites may nest."""
        outer: list[tuple[Seam, str] | None] = []

        def enter(*_: Any) -> None:
            outer.append(getattr(_local, "running", None))
            _local.running = (self, name)

        def leave(*_: Any) -> None:
            if outer:
                _local.running = outer.pop()

        self._stack.callback(module.register_forward_pre_hook(enter).remove)
        last_in_first_out = module.register_forward_hook(leave, always_call=True, prepend=True)
        self._stack.callback(last_in_first_out.remove)


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold an attention processor, by path: what a backbone may offer as sites."""
    named = model.named_modules()
    return {name: m for name, m in named if hasattr(m, "processor") and hasattr(m, "heads")}


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
