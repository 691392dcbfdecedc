"""What may stand in a torch file beside tensors: NumPy's numbers and arrays, and curvlinops' names.

Torch's unpickler calls nothing that it does not know. Instead of NumPy's own functions, which can be made to unpickle
objects, it is given these, which take numbers and nothing else.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

PLAIN = frozenset("biufc")


class DType:
    """Stands for numpy.dtype: a name such as "f4", and the byte order that is set afterwards."""

    def __init__(self, name: str, *_: Any) -> None:
        self.dtype = np.dtype(str(name))
        if self.dtype.kind not in PLAIN:
            raise ValueError(f"a NumPy array of {self.dtype}; plain numbers were expected")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


def scalar(dtype: DType, data: bytes) -> int | float | str:
    """Stands for numpy's scalar: one number from its bytes."""
    value = np.frombuffer(data, dtype.dtype, count=1)[0].item()
    return value if isinstance(value, int | float) else str(value)


class Array:
    """Stands for numpy.ndarray: `tensor` is there once the state is set."""

    tensor: Tensor

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        values = np.frombuffer(bytearray(data), dtype.dtype)
        values = values.astype(dtype.dtype.newbyteorder("=")).reshape(shape, order="F" if fortran else "C")
        self.tensor = torch.from_numpy(values)


def array(kind: Any, shape: Any, code: Any) -> Array:
    """Stands for NumPy's _reconstruct."""
    return Array()


def text(value: str) -> str:
    """Stands for an enumeration of strings."""
    return str(value)


def stand_ins() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """For `torch.serialization.safe_globals`."""
    cores = ("numpy.core.multiarray", "numpy._core.multiarray")
    return [
        (DType, "numpy.dtype"),
        (Array, "numpy.ndarray"),
        *((scalar, f"{core}.scalar") for core in cores),
        *((array, f"{core}._reconstruct") for core in cores),
        (text, "curvlinops.kfac.FisherType"),
        (text, "curvlinops.kfac.KFACType"),
    ]
