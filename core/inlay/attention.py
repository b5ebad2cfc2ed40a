"""The seam: which attention module is running (module hooks), and what it computes (one SDPA dispatcher for all sessions).

Outside subscribed sites of a running session every call passes straight through; the last session to close restores torch.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .edits import SiteProgram
from .errors import SeamMissed

_local = threading.local()  # .running: the site being computed in this thread, and nothing else
_lock = threading.Lock()
_installed = 0
_original: Any = None
_wrapped = False  # somebody replaced SDPA on top of us and holds our dispatcher: installing again would call in circles


def _dispatch(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
              is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
    running: _Running | None = getattr(_local, "running", None)
    if running is None:
        return _original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)  # type: ignore[no-any-return]
    running.seam.hit.add(running.name)
    program = running.seam.programs.get(running.name)
    if program is None:
        return _original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)  # type: ignore[no-any-return]
    return program(_original, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


class _Running:
    """One call of one subscribed module."""

    __slots__ = ("name", "outer", "seam")

    def __init__(self, seam: Seam, name: str, outer: _Running | None) -> None:
        self.seam, self.name, self.outer = seam, name, outer


class Seam:
    """Context manager around a run: hooks on `modules` (site name -> module), none when it is empty.

    `programs` is what each site computes in the model call that follows; a site without one runs untouched.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules, self.programs, self.hit = modules, dict[str, SiteProgram](), set[str]()
        self._stack = ExitStack()

    def __enter__(self) -> Seam:
        if self.modules:
            _install()
            self._stack.callback(_uninstall)
        for name, module in self.modules.items():
            before = module.register_forward_pre_hook(lambda *_, name=name: self._enter(name))
            after = module.register_forward_hook(lambda *_, name=name: self._leave(name), always_call=True)
            self._stack.callback(before.remove)
            self._stack.callback(after.remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def _enter(self, name: str) -> None:
        _local.running = _Running(self, name, getattr(_local, "running", None))

    def _leave(self, name: str) -> None:
        running: _Running | None = getattr(_local, "running", None)
        if running is not None and running.name == name:  # else: the forward failed before our pre-hook ran
            _local.running = running.outer

    def check(self) -> None:
        """After a model call: raises SeamMissed when a site with a program did not reach SDPA in it."""
        for name in self.programs:
            if name not in self.hit:
                processor = type(getattr(self.modules[name], "processor", None)).__name__
                raise SeamMissed(f"its processor {processor} never called scaled_dot_product_attention", where=f"site {name}",
                                 fix='Call model.set_attention_backend("native") or use an SDPA processor (AttnProcessor2_0).')  # fmt: skip
        self.hit.clear()


def _install() -> None:
    global _installed, _original, _wrapped
    with _lock:
        if _installed == 0 and not (_wrapped and F.scaled_dot_product_attention is not _original):
            _original, _wrapped = F.scaled_dot_product_attention, False
            F.scaled_dot_product_attention = _dispatch
        _installed += 1


def _uninstall() -> None:
    global _installed, _wrapped
    with _lock:
        _installed -= 1
        if _installed == 0:
            _wrapped = F.scaled_dot_product_attention is not _dispatch
            if not _wrapped:
                F.scaled_dot_product_attention = _original


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold an attention processor, by path: the sites a backbone may offer."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "processor") and hasattr(m, "heads")}


