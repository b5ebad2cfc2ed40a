"""Code blocks and headings of the documentation, and how to run a block as a module."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text, language):
    """Fenced code blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S)


def sections(text, level=2):
    """Heading -> the text below it, up to the next heading of that level."""
    parts = re.split(rf"^{'#' * level} (.+)$", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def module(code, folder, name="page"):
    """Import code as a module from a file in `folder`."""
    path = Path(folder) / f"{name}.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made
