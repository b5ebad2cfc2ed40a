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
        owed = (
            f"{self.owners[key]} has not published it yet" if key in self.owners else "undeclared"
        )
        fix = f"On the board: {sorted(self)}."
        raise PluginError(f"{key!r} is not there: {owed}", where="board", fix=fix)

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self.owners:
            fix = f'Call need.publish("{key}") in inlay_declare.'
            raise PluginError(
                f"{key!r} was published without being declared", where="board", fix=fix
            )
        super().__setitem__(key, value)

    def of(self, kind: str) -> list[tuple[str, Any]]:
        """(name, value) of every key `kind:name`."""
        return [(k.split(":", 1)[1], v) for k, v in self.items() if k.startswith(f"{kind}:")]
