"""The words of inlay as data: windows, lanes, branches, sites, steps. No method and no loop lives here.

Shapes: `b` pictures of a lane, `R` rows of one model call, `h` heads, `n` tokens, `d` head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from .errors import ConfigError, InlayError, PluginError
from .frames import Frame

if TYPE_CHECKING:
    from .board import Board

Span = Literal["all", "text", "image"]


class Plugin:
    """Base of every plugin: holds the parsed `Config` as `self.cfg`. Methods marked `@hookimpl` are its events.

    `name` is the key under `plugins:` in the experiment; `api` the version of the hooks it was written for.
    """

    api: ClassVar[int] = 1

    @dataclass
    class Config: ...

    def __init__(self, cfg: Any = None, name: str = "") -> None:
        self.cfg, self.name = cfg if cfg is not None else type(self).Config(), name or type(self).__name__


@dataclass(frozen=True, slots=True)
class Window:
    """Steps in which something acts. Integers are step indices, both ends included (as the papers count);
    floats are progress: step i of N is inside when start <= i/N < stop, and 1.0 includes the last step."""

    start: float = 0.0
    stop: float = 1.0

    @classmethod
    def parse(cls, value: Any, where: str) -> Window | None:
        """`null` or -1: off; n: steps 0..n; [start, stop]. Raises ConfigError, naming `where` (a YAML path)."""
        if value is None or value == -1:
            return None
        pair = [0 if isinstance(value, int) else 0.0, value] if isinstance(value, (int, float)) else value
        if isinstance(pair, Mapping):
            pair = [pair.get("start", 0.0), pair.get("stop", 1.0)]
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(v, (int, float)) for v in pair):
            raise ConfigError(f"{value!r} is no window", where=where, fix="Give [first, last] steps or progress in 0..1.")
        start, stop = pair
        if not (math.isfinite(start) and math.isfinite(stop)) or start < 0 or stop < start:
            raise ConfigError(f"window {pair} runs backwards or is not finite", where=where, fix="Give 0 <= start <= stop.")
        if (isinstance(start, float) or isinstance(stop, float)) and stop > 1:
            raise ConfigError(f"window {pair} is outside 0..1", where=where, fix="Floats are progress; use integers for steps.")
        return cls(start, stop)

    def steps(self, total: int, where: str = "window") -> range:
        """Step indices of a run of `total` steps. Raises ConfigError when the window lies outside the run."""
        if isinstance(self.start, int) and isinstance(self.stop, int):
            if self.stop >= total:
                raise ConfigError(f"steps {self.start}..{self.stop} are outside a run of {total} steps", where=where,
                                  fix=f"Use 0..{total - 1}, or progress (0.0..1.0), which fits any number of steps.")  # fmt: skip
            return range(self.start, self.stop + 1)
        return range(math.ceil(self.start * total - 1e-9), total if self.stop == 1 else math.ceil(self.stop * total - 1e-9))


@dataclass(frozen=True, slots=True)
class Lane:
    """One latent trajectory of a pass. `prompt` names its condition; `steps` are those in which its rows are evaluated.

    guidance None: the run's. start "noise": the lane's own x_T; "set": a plugin writes it in `inlay_begin` or `inlay_pre_step`.
    follows: x is written by a plugin before every forward, so steps nobody needs may be skipped.
    """

    name: str
    prompt: str
    n: int
    seed: int
    guidance: float
    start: Literal["noise", "set"] = "noise"
    follows: bool = False
    keep: bool = True
    steps: tuple[int, ...] = ()
    owners: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Branch:
    """Rows of the model batch: one lane under one condition. `role` is what `combine` uses it as."""

    name: str
    lane: str
    role: Literal["text", "null"]
    cond: str
    n: int


@dataclass(frozen=True, slots=True)
class AttnSite:
    """One attention module. `depth` 0..1 is its place among the sites; `block` the family's word for where it lives."""

    name: str
    index: int
    kind: Literal["self", "cross", "joint"]
    block: str
    depth: float
    heads: int
    dim: int
    scale: int = 1  # image tokens per side = latent grid / scale


@dataclass(frozen=True, slots=True)
class Probe:
    """A declared reading of attention probabilities, averaged over heads, of `branch` at `sites`.

    read "columns": P[image rows, text tokens] as `b n t`; "rows": P[text tokens, image columns] as `b t n`; "mass": share of the
    probability of the text queries that falls on (own text, own image, appended) as `b 3`.
    """

    name: str
    plugin: str
    branch: str
    read: Literal["columns", "rows", "mass"]
    sites: frozenset[str]
    steps: frozenset[int]
    word: str | tuple[int, ...] = ()


@dataclass
class Cond:
    """An encoded prompt. embeds `1 t c`, pooled `1 c` or None; `tokens` the text pieces of the rows of `embeds`."""

    embeds: Tensor
    pooled: Tensor | None = None
    tokens: list[str] = field(default_factory=list)

    def find(self, word: str) -> tuple[int, ...]:
        """Indices of all pieces of `word` (first occurrence, whole words). Raises InlayError when it is not in the prompt."""
        text, owner = "", []
        for i, piece in enumerate(self.tokens):
            clean = piece.replace("</w>", " ").replace("▁", " ").replace("Ġ", " ")
            text, owner = text + clean, owner + [i] * len(clean)
        wanted, start = " ".join(word.split()).lower(), -1
        folded = text.lower()
        while (start := folded.find(wanted, start + 1)) >= 0:
            before, after = folded[start - 1 : start], folded[start + len(wanted) : start + len(wanted) + 1]
            if not (before.isalnum() or after.isalnum()) and wanted:
                return tuple(dict.fromkeys(owner[start : start + len(wanted)]))
        raise InlayError(f"{word!r} is not in the prompt {text.strip()!r}", where="subject",
                         fix="Use the very words of prompt.edit (whole words, singular or plural as written).")  # fmt: skip


class LazyX0(dict[str, Tensor]):
    """x0 per lane: computed when first read, remembered as written when a plugin assigns it (`written`)."""

    def __init__(self, compute: Callable[[str], Tensor]) -> None:
        super().__init__()
        self.compute, self.written = compute, set[str]()

    def __missing__(self, lane: str) -> Tensor:
        dict.__setitem__(self, lane, self.compute(lane))
        return self[lane]

    def __setitem__(self, lane: str, value: Tensor) -> None:
        self.written.add(lane)
        dict.__setitem__(self, lane, value)


class ReadOnly(dict[str, Tensor]):
    """What `inlay_observe` sees: writing raises."""

    def __setitem__(self, key: str, value: Tensor) -> None:
        raise PluginError(f"tried to write {key!r}", where="observe", fix="Observers read; write in post_step or denoised.")


@dataclass
class Step:
    """One solver evaluation. `index` counts the user's steps of `total`, `eval` the model evaluations.

    x `b …` per lane before the step (valid from pre_step), preds per branch and output per lane (after the forward),
    x0 (denoised), x_next (post_step), probes[name][site]. Latents are in the model's own layout (FLUX: packed `b n c`).
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
class Rows:
    """Names the rows of one model call: `rows["edit/text"]` is a slice. Nobody counts rows by hand."""

    slices: dict[str, slice]

    def __getitem__(self, branch: str) -> slice:
        return self.slices[branch]

    def __contains__(self, branch: str) -> bool:
        return branch in self.slices

    def __iter__(self) -> Iterator[str]:
        return iter(self.slices)


@dataclass
class ModelCall:
    """One call of the denoiser: plugins may change `kwargs` in `inlay_inputs` (extra channels, extra tokens)."""

    step: Step
    rows: Rows
    kwargs: dict[str, Any]


@dataclass
class Preds:
    """What `combine` gets for one lane: text and null predictions, the guidance scale, the step."""

    lane: str
    text: Tensor
    null: Tensor | None
    scale: float
    step: Step


@dataclass
class Result:
    """images[lane] `n 3 h w` in 0..1, latents[lane] in model layout, the board, the manifest."""

    images: dict[str, Tensor]
    latents: dict[str, Tensor]
    board: Board
    manifest: dict[str, Any]

    def save(self, folder: Any) -> None:
        """Write images, masks and manifest.json to `folder`; each file is written beside and renamed."""
        from .manifest import save_result

        save_result(self, folder)


def stream(seed: int, *names: str) -> torch.Generator:
    """A CPU generator of its own for each (seed, names), so that adding a plugin never moves another's noise."""
    import hashlib

    digest = hashlib.sha256("/".join((str(seed), *names)).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
