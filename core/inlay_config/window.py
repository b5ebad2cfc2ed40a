"""Windows: how experiments say in which steps something acts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from inlay_config.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Window:
    """Steps in which something acts. Integers are step indices, both ends included, as in papers;
    floats are progress: step i of N is inside when start <= i/N < stop."""

    start: float = 0.0
    stop: float = 1.0

    @classmethod
    def parse(cls, value: Any, where: str) -> Window | None:
        """null or -1: off; n: 0..n; [start, stop]. Raises ConfigError that names the YAML path."""
        if value is None or value == -1:
            return None
        if isinstance(value, Mapping):
            value = [value.get("start", 0.0), value.get("stop", 1.0)]
        pair = [type(value)(0), value] if isinstance(value, int | float) else list(value)
        if len(pair) != 2 or not all(isinstance(v, int | float) and math.isfinite(v) for v in pair):
            raise ConfigError(f"{value!r} is no window", where=where, fix="Give [start, stop].")
        if not 0 <= pair[0] <= pair[1]:
            raise ConfigError(f"window {pair} runs backwards", where=where, fix="Put start first.")
        if float in map(type, pair) and pair[1] > 1:
            fix = "Floats are progress, 0.0 to 1.0; use integers for steps."
            raise ConfigError(f"window {pair} is outside 0..1", where=where, fix=fix)
        return cls(*pair)

    def steps(self, total: int, where: str = "window") -> range:
        """Step indices in a run of `total` steps. Raises ConfigError when outside the run."""
        if isinstance(self.start, int) and isinstance(self.stop, int):
            if self.stop >= total:
                fix = f"Use 0..{total - 1}, or progress (0.0 to 1.0), which fits any number."
                problem = f"steps {self.start}..{self.stop} are outside a run of {total} steps"
                raise ConfigError(problem, where=where, fix=fix)
            return range(self.start, self.stop + 1)
        return range(*(math.ceil(edge * total - 1e-9) for edge in (self.start, self.stop)))
