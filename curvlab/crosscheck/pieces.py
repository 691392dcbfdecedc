"""Tensors of all files with what is claimed of them, by keys, file names and, where these say nothing, by evidence."""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlab.crosscheck.evidence import as_short
from curvlab.crosscheck.extremes import is_count
from curvlab.crosscheck.formats.refusal import printable
from curvlab.crosscheck.kinds import by_evidence
from curvlab.crosscheck.names import SUMS, Claim, of_file, role_of_key, statistics_layer
from curvlab.crosscheck.parts import Stored
from curvlab.crosscheck.sides import AUTHORS_MASK
from curvlab.layers import LayerShape


@dataclass(frozen=True)
class Piece:
    """One tensor with what is claimed of it.

    Attributes:
        layer: by its key or its file's name; "" where neither tells.
        claim: by its key or its file's name, else what it shows; None where nothing tells.
        file: number of its file, in order.
    """

    layer: str
    claim: Claim | None
    tensor: Tensor
    source: str
    evidence: str
    file: int
    order: int = 0
    own: bool = False  # a weight under its own name in a checkpoint: of no other layer


def known_names(stored: Sequence[Stored], layers: Mapping[str, LayerShape] | None) -> set[str]:
    """Names of layers that the model, files of statistics, or keys of factors and weights give."""
    known = set(layers or ()) | {statistics_layer(file.path) for file in stored}
    for file in stored:
        named = [role_of_key(key) for key in file.tensors]
        known |= {layer for claim, layer in named if claim in ("A", "S", "weight")}
    return known - {""}


def claimed(stored: Sequence[Stored], known: Collection[str]) -> tuple[list[Piece], dict[tuple[int, str, str], float]]:
    """Tensors with their claims, and counts by file, layer and side; `known`: names of layers."""
    pieces: list[Piece] = []
    counts: dict[tuple[int, str, str], float] = {}
    names = Counter(file.path.name for file in stored)
    for number, file in enumerate(stored):
        name = file.path.name if names[file.path.name] == 1 else f"{file.path.parent.name}/{file.path.name}".strip("/")
        name = printable(name)
        file_layer, file_claim = of_file(file.path, known)
        file_layer = printable(file_layer)
        numbers = dict(file.numbers)
        tensors = {}
        for key, tensor in file.tensors.items():
            if tensor.numel() == 1 and role_of_key(key)[0] in ("count", "count_out"):
                numbers[key] = float(tensor)
            else:
                tensors[key] = tensor
        for key, value in numbers.items():
            claim, layer = role_of_key(key)
            if claim in ("count", "count_out"):
                counts[number, layer or file_layer, claim] = _number(value)
            elif claim in ("A", "S") and isinstance(value, int | float) and tensors:
                tensors[key] = torch.tensor(_number(value))  # a factor without rows and columns, which is said
        for order, (key, tensor) in enumerate(tensors.items()):
            claim, layer = role_of_key(key)
            by = "its key"
            if claim is None:
                claim, by = file_claim, "its file's name"
            if claim == "ignored":
                continue
            if claim in (None, "values", "vectors", "weight") or (claim == "factor"):
                claim, by = by_evidence(claim, tensor, by)
            source = f"{name}: {printable(key)}" if key else name
            raw = not file.format.startswith(("curvlab", "curvlinops"))  # those readers give means
            if raw and (key.split("/")[-1] in SUMS or file.path.stem in SUMS):
                tensor, source = _mean(tensor, source, counts, number, layer or file_layer, claim)
            if claim == "mask" and key.split("/")[-1] == "M":
                by = f"{by}; {AUTHORS_MASK}"
            pieces.append(Piece(layer or file_layer, claim, tensor, source, by, number, order))
    return pieces, counts


def _number(value: int | float | str) -> float:
    """NaN for words."""
    try:
        return float(value)
    except OverflowError:  # an integer beyond all floats
        return math.inf
    except ValueError:
        return math.nan


def _mean(
    tensor: Tensor,
    source: str,
    counts: Mapping[tuple[int, str, str], float],
    file: int,
    layer: str,
    claim: Claim | None,
) -> tuple[Tensor, str]:
    """A format that keeps sums and their counts: the mean."""
    count = counts.get((file, layer, "count_out" if claim == "S" else "count"))
    if count is None or not is_count(count) or not tensor.is_floating_point():
        return tensor, source
    return as_short(tensor.double() / count, tensor).to(tensor.dtype), f"{source} / {count:.0f}"  # no more digits
