"""Methods replaced on one instance, in layers that come and go in any order without a trace."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

Layer = Callable[..., Any]
"""layer(call, *args, **kwargs): what is called instead; `call` is the method below."""

_lock = threading.Lock()
_absent = object()


class _Layered:
    """Stands in an instance's `__dict__` for one of its methods, with that method's signature."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name, self.layers = owner, name, list[Layer]()
        self.before, self.method = vars(owner).get(name, _absent), getattr(owner, name)
        functools.update_wrapper(self, self.method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call: Callable[..., Any] = self.method
        for layer in self.layers:
            call = functools.update_wrapper(partial(layer, call), self.method)
        return call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copied scheduler gets its own method back: nobody watches copies."""
        return MethodType(self.method.__func__, memo[id(self.owner)])


def layer(owner: Any, name: str, added: Layer) -> Callable[[], None]:
    """Put a layer on the method `owner.name`; what is returned takes it away again, and with the
    last one the method is the class's own, unless somebody else has replaced it meanwhile."""
    with _lock:
        held = vars(owner).get(name)
        if not isinstance(held, _Layered):
            held = vars(owner)[name] = _Layered(owner, name)
        held.layers.append(added)

    def remove() -> None:
        with _lock:
            held.layers.remove(added)
            if held.layers or vars(owner).get(name) is not held:
                return
            if held.before is _absent:
                del vars(owner)[name]
            else:
                vars(owner)[name] = held.before

    return remove
