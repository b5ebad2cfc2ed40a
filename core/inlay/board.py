"""The board: values that plugins publish for one another (`mask:subject`, `latent:source`)."""

from __future__ import annotations

from typing import Any

from inlay_config.errors import PluginError


class Board(dict[str, Any]):
    """Values by key `kind:name`; only declared keys may be written. owners: key -> plugin."""

    def __init__(self, owners: dict[str, str] | None = None) -> None:
        super().__init__()
        self.owners = owners or {}

    def __missing__(self, key: str) -> Any:
        owner = self.owners.get(key, "nobody")
        problem, fix = f"{key!r} of {owner} is not there yet", f"Published: {sorted(self)}."
        raise PluginError(problem, where="board", fix=fix)

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self.owners:
            problem, fix = f"{key!r} was never declared", "Call need.publish in inlay_declare."
            raise PluginError(problem, where="board", fix=fix)
        super().__setitem__(key, value)

    def of(self, kind: str) -> list[tuple[str, Any]]:
        """(name, value) of every key `kind:name`."""
        return [(k.split(":", 1)[1], v) for k, v in self.items() if k.startswith(f"{kind}:")]
