"""torch.compile for the runs of one session: the model is compiled together with its edits.

Dynamo looks at the hooks of a module once, when it compiles it. Code from before a session knows
nothing of the session's sites, and code from a session is not to be left behind. So the compiled
call is put in place when a run begins and taken away when it ends, it is shared with nobody, and
all sites are hooked in every run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import TorchDynamoException

from inlay_config.errors import ModelError

from .base import Backbone

DEFAULTS = {"fullgraph": True, "dynamic": False, "recompile_limit": 64}


class Compiled:
    """The denoiser of a session, compiled. options: `torch.compile`'s own over DEFAULTS; regional:
    the blocks that hold attention are compiled in place of the whole model, equal ones once.

    Raises ModelError for a model that offload hooks move about, and for what cannot be compiled.
    """

    def __init__(self, backbone: Backbone, options: bool | Mapping[str, Any]) -> None:
        given = dict(options) if isinstance(options, Mapping) else {}
        self.asked = {k: getattr(v, "__name__", v) for k, v in given.items()} or True
        regional, asked = given.pop("regional", False), DEFAULTS | given
        if any(hasattr(m, "_hf_hook") for m in backbone.denoiser.modules()):
            fix = "Use offload=none, or compile=false."
            raise ModelError(
                "offload moves the weights of a compiled model", where="compile", fix=fix
            )
        self.targets = _blocks(backbone) if regional else [backbone.denoiser]
        compiler: Any = torch.compile
        self._call = compiler(_forward, isolate_recompiles=True, **asked)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Compiled code is in place; what was there before comes back."""
        before = [module._compiled_call_impl for module in self.targets]
        try:
            for module in self.targets:
                module._compiled_call_impl = partial(self._run, module)  # as Module.compile() does
            # a site is marked as it runs, which need not be repeated when a block is recomputed
            with dynamo_config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
                yield
        finally:
            for module, call in zip(self.targets, before, strict=True):
                module._compiled_call_impl = call

    def _run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._call(module, args, kwargs)
        except TorchDynamoException as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            problem = f"{type(module).__name__} cannot be compiled: {' '.join(lines[:3])[:300]}"
            fix = "Use compile=false to see what happens, or compile.fullgraph=false."
            raise ModelError(problem, where="compile", fix=fix) from error


def _forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return module._call_impl(*args, **kwargs)


def _blocks(backbone: Backbone) -> list[nn.Module]:
    """What repeats: a site's path up to its last number, "transformer_blocks.0" of
    "transformer_blocks.0.attn"."""
    numbered = {name: re.match(r".*\.\d+(?=\.|$)", name) for name in backbone.modules}
    paths = {found[0] if found else name for name, found in numbered.items()}
    return [backbone.denoiser.get_submodule(path) for path in sorted(paths)]
