"""The command line as the tests call it."""

from collections.abc import Callable

Invoke = Callable[..., tuple[int, str, str]]
"""`inlay WORDS...` -> exit code, stdout, stderr."""
