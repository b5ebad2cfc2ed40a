"""The words of inlay as data: windows, lanes, branches, sites, steps. No method and no loop here.

Shapes: `b` pictures of a lane, `R` rows of one model call, `h` heads, `n` tokens, `d` head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from inlay_attention import Rows as Rows  # of one model call; named by the hooks
from inlay_config import images, manifest
from inlay_config.window import Window as Window

from .frames import Frame

if TYPE_CHECKING:
    from .board import Board


class Plugin:
    """Base of every plugin: `cfg` is its parsed `Config`, methods with `@hookimpl` its events.
    name: its key in the YAML; api: of the hooks; after, before: plugins to follow, precede.
    """

    api: ClassVar[int] = 1
    after: ClassVar[tuple[str, ...]] = ()
    before: ClassVar[tuple[str, ...]] = ()

    @dataclass
    class Config: ...

    def __init__(self, cfg: Any = None, name: str = "") -> None:
        self.cfg: Any = cfg if cfg is not None else type(self).Config()
        self.name = name or type(self).__name__


@dataclass(frozen=True, slots=True)
class Lane:
    """One latent trajectory of a pass under the prompt `prompt`; evaluated in `steps` only.
    follows: a plugin writes its x before every forward, so steps that nobody needs are skipped.
    keep: decode it when it reaches the end. true_cfg: the run's, unless its declaration says else.
    """

    name: str
    prompt: str
    n: int
    seed: int
    guidance: float
    true_cfg: float
    follows: bool = False
    keep: bool = True
    steps: tuple[int, ...] = ()
    owners: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Branch:
    """Rows of the model batch: a lane under one condition, evaluated in `steps`. role: what it is
    used as: text, null (classifier-free guidance), or a name that a plugin gave it. replayed: a
    store answers for it."""

    name: str
    lane: str
    role: str
    cond: str
    n: int
    steps: tuple[int, ...]
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class AttnSite:
    """One attention module. depth: 0..1, its place among the sites; block: the family's word for
    where it lives; scale: image tokens per side = latent grid / scale."""

    name: str
    index: int
    kind: Literal["self", "cross", "joint"]
    block: str
    depth: float
    heads: int
    dim: int
    scale: int = 1


class LazyX0(dict[str, Tensor]):
    """x0 per lane: computed when first read; lanes that a plugin assigned are in `written`."""

    def __init__(self, compute: Callable[[str], Tensor]) -> None:
        super().__init__()
        self.compute, self.written = compute, set[str]()

    def __missing__(self, lane: str) -> Tensor:
        super().__setitem__(lane, self.compute(lane))
        return self[lane]

    def __setitem__(self, lane: str, value: Tensor) -> None:
        self.written.add(lane)
        super().__setitem__(lane, value)

    def offer(self, lane: str, value: Tensor) -> None:
        """What is read from now on; nothing counts as written."""
        super().__setitem__(lane, value)


@dataclass
class Step:
    """One solver evaluation: `index` counts the user's steps, `eval` the model's evaluations.

    Latents are in the model's layout (`b c h w`; FLUX packed `b n c`), by lane: x from pre_step on,
    output after the forward, x0 from denoised on, x_next in post_step. preds: by branch.
    probes[name][site]: complete in post_step. last_eval: the last evaluation of its step.
    """

    pass_: str
    index: int
    eval: int
    total: int
    t: Tensor
    last_eval: bool
    lanes: tuple[str, ...]
    frame_at: Callable[[int], Frame]
    x: dict[str, Tensor]
    preds: dict[str, Tensor] = field(default_factory=dict)
    output: dict[str, Tensor] = field(default_factory=dict)
    x_next: dict[str, Tensor] = field(default_factory=dict)
    probes: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    x0: LazyX0 = field(init=False)

    def __post_init__(self) -> None:
        self.x0 = LazyX0(lambda lane: self.frame.x0(self.output[lane], self.x[lane]))

    @property
    def progress(self) -> float:
        return self.index / self.total

    @property
    def frame(self) -> Frame:
        return self.frame_at(self.eval)

    @property
    def next_frame(self) -> Frame:
        return self.frame_at(self.eval + 1)


@dataclass
class Result:
    """images[lane] `n 3 h w` in 0..1; latents[lane] in model layout; board; what was run."""

    images: dict[str, Tensor]
    latents: dict[str, Tensor]
    board: Board
    record: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What repeats this run; weights and pictures are hashed when it is first asked for."""
        return manifest.build(**self.record)

    def save(self, folder: Any) -> None:
        """Write pictures, masks and manifest.json, each beside its place and then renamed."""
        images.save_result(self, folder)
