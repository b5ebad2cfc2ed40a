"""The board: typed values that plugins publish for one another (`mask:subject`, `latent:source`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .errors import PluginError


class Board(dict[str, Any]):
    """Values by key `kind:name`. A plugin may only write keys that were declared; reading what is not there yet says who owes it."""

    def __init__(self, owners: dict[str, str] | None = None) -> None:
        super().__init__()
        self.owners: dict[str, str] = owners or {}

    def __missing__(self, key: str) -> Any:
        owed = f"{self.owners[key]} declared it but has not published it yet" if key in self.owners else "nobody declared it"
        raise PluginError(f"{key!r} is not on the board: {owed}", where="board", fix=f"On the board: {sorted(self)}.")

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self.owners:
            raise PluginError(f"{key!r} was published without being declared", where="board",
                              fix=f'Call need.publish("{key}") in inlay_declare.')  # fmt: skip
        super().__setitem__(key, value)

    def of(self, kind: str) -> Iterable[tuple[str, Any]]:
        """(name, value) of every key `kind:name`."""
        return [(k.split(":", 1)[1], v) for k, v in self.items() if k.startswith(f"{kind}:")]
