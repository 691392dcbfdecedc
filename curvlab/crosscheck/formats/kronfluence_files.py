"""kronfluence's factor files: one safetensors file a kind of factor, one tensor a module.

Sums lie beside their counts in files of their own. Covariances stay sums, with the count as a number: so they are
known by their names ("activation_covariance" over "num_activation_covariance_processed" positions, kronfluence 1.0.1,
`factor/eigen.py`). "lambda_matrix" is divided by "num_lambda_processed", as kronfluence itself does before using it
(`factor/config.py`). Eigenvectors stand in columns, in ascending order of the eigenvalues of the *means*.
"""

import math
import re
from pathlib import Path

from torch import Tensor

from curvlab.crosscheck.formats.nested import Number, number
from curvlab.crosscheck.formats.refusal import UnreadableFile, require_memory
from curvlab.crosscheck.parts import Stored

COUNTS = {
    "activation_covariance": "num_activation_covariance_processed",
    "gradient_covariance": "num_gradient_covariance_processed",
    "lambda_matrix": "num_lambda_processed",
}
OTHERS = {"activation_eigenvectors", "activation_eigenvalues", "gradient_eigenvectors", "gradient_eigenvalues"}
NAME = re.compile(r"(?P<kind>[a-z_]+?)(?P<part>_data_partition\d+_module_partition\d+)?\.safetensors")


def is_theirs(path: Path) -> bool:
    return _kind(path) in {*COUNTS, *COUNTS.values(), *OTHERS}


def counts_beside(path: Path) -> Path | None:
    """The file with the counts of a file of sums, where there is one."""
    count = COUNTS.get(_kind(path))
    beside = path.with_name(path.name.replace(_kind(path), count, 1)) if count else None
    return beside if beside is not None and beside.is_file() else None


def by_module(stored: Stored, counts: Stored | None) -> Stored:
    """Keys "<module>/<kind>", counts as numbers "<module>/num_…_processed".

    Raises:
        UnreadableFile: counts that are none.
    """
    kind = _kind(stored.path)
    if kind in COUNTS.values():
        return Stored(stored.path, "kronfluence factors", {}, _counts(stored, kind))
    numbers = {} if counts is None else _counts(counts, COUNTS[kind])
    tensors: dict[str, Tensor] = {}
    for module, tensor in stored.tensors.items():
        if kind == "lambda_matrix" and f"{module}/{COUNTS[kind]}" in numbers:
            require_memory(stored.path, tensor.numel() * tensor.itemsize, "dividing its sums by their counts")
            tensor = tensor / int(numbers[f"{module}/{COUNTS[kind]}"])
        tensors[f"{module}/{kind}"] = tensor
    return Stored(stored.path, "kronfluence factors", tensors, numbers)


def _counts(stored: Stored, kind: str) -> dict[str, Number]:
    numbers: dict[str, Number] = {}
    for module, tensor in stored.tensors.items():
        if tensor.numel() != 1 or not 1 <= float(tensor) < math.inf:
            raise UnreadableFile(
                stored.path, f"the count of {module!r} is no positive number but {number(tensor.tolist())}"
            )
        numbers[f"{module}/{kind}"] = int(tensor)
    return numbers


def _kind(path: Path) -> str:
    found = NAME.fullmatch(path.name)
    return found["kind"] if found else ""
