"""Numbers out of other frameworks' files, without running anything that the files say.

A pickle is a program. `arrays` runs it with an alphabet of three names, all of which are our own
stand-ins for numpy's; `storages` reads a TorchScript archive's numbers and no pickle at all.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inlay_config.errors import ModelError

LITTLE_ENDIAN_FLOAT32 = ("f4", "<")


class _Dtype:
    """Stands for `numpy.dtype`: float32, the bytes in little-endian order, or nothing."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _Array:
    """Stands for `numpy.ndarray`."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        if (dtype.code, dtype.order) != LITTLE_ENDIAN_FLOAT32 or fortran is not False:
            raise pickle.UnpicklingError("an array that is not float32 in C order")
        self.value = torch.from_numpy(np.frombuffer(content, "<f4").reshape(shape).copy())


def _blank_array(*_: Any) -> _Array:
    return _Array()


ALPHABET = {
    "numpy.core.multiarray._reconstruct": _blank_array,
    "numpy._core.multiarray._reconstruct": _blank_array,
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
}


class _Reader(pickle.Unpickler):
    """Refuses every name outside `ALPHABET`, and by inheritance every persistent id."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in ALPHABET:
            raise pickle.UnpicklingError(f"the name '{module}.{name}', which no array needs")
        return ALPHABET[f"{module}.{name}"]


def arrays(content: bytes, where: str) -> dict[str, Tensor]:
    """A pickled nest of dictionaries of numpy arrays as float32 tensors, keys joined by `/`.

    Raises ModelError, naming what was met, for anything else in the pickle.
    """
    try:
        return dict(_leaves(_Reader(io.BytesIO(content)).load()))
    except Exception as error:  # broken or hostile bytes raise anything
        fix = "Do not use this file."
        raise ModelError(f"is not read, it holds {error}", where=where, fix=fix) from error


def _leaves(nest: Any, prefix: str = "") -> list[tuple[str, Tensor]]:
    if isinstance(nest, _Array):
        return [(prefix, nest.value)]
    if not isinstance(nest, dict):
        raise pickle.UnpicklingError(f"a {type(nest).__name__} among arrays")
    parts = ((f"{prefix}/{key}" if prefix else str(key), nest[key]) for key in nest)
    return [leaf for key, part in parts for leaf in _leaves(part, key)]


def storages(content: bytes, where: str) -> list[Tensor]:
    """The float32 storages of a TorchScript archive in the order in which it was saved, each flat.

    Raises ModelError for what is no such archive.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = {
                int(match[1]): name
                for name in archive.namelist()
                if (match := re.fullmatch(r"[^/]+/data/(\d+)", name))
            }
            found = [archive.read(names[i]) for i in range(len(names))]
            return [torch.from_numpy(np.frombuffer(part, "<f4").copy()) for part in found]
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ModelError(f"is no TorchScript archive of float32: {error}", where=where) from error
