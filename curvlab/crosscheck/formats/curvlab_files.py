"""What curvlab itself saves, by layer and role, sums as means."""

import json
import math
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from curvlab.crosscheck.formats.nested import Number, number
from curvlab.crosscheck.formats.refusal import UnreadableFile, first_line, require_memory
from curvlab.crosscheck.parts import Stored

NAMES = {
    "kfac": "curvlab K-FAC",
    "ekfac": "curvlab EK-FAC",
    "covariance": "curvlab covariance",
    "spectrum": "curvlab spectrum",
    "null space": "curvlab null space",
    "ellipsoid": "curvlab ellipsoid",
}


def is_ours(stored: Stored) -> bool:
    return "curvlab" in stored.numbers and stored.numbers.get("kind") in NAMES


def by_role(stored: Stored) -> Stored:
    """Keys "<layer>/<role>" (see `curvlab.crosscheck.readers`), from the header that was written with the tensors.

    Raises:
        UnreadableFile: a header that does not describe the tensors.
    """
    path, kind = stored.path, str(stored.numbers["kind"])
    header = {name: str(value) for name, value in stored.numbers.items()}
    try:
        if kind in ("kfac", "covariance"):
            tensors, numbers = _statistics(stored, json.loads(header["factors" if kind == "kfac" else "moments"]))
        else:
            tensors, numbers = _bases(stored, json.loads(header["bases"]))
            numbers |= _scales(json.loads(header.get("scales", "{}")))
            for name, value in _entries(json.loads(header.get("numbers", "{}"))):
                numbers[name] = value
        numbers |= {name: header[name] for name in ("curvlab", "kind", "sharing") if name in header}
        if "labels" in header:
            numbers["labels"] = header["labels"].strip('"')
        numbers |= {f"origin/{name}": value for name, value in _entries(json.loads(header.get("origin", "null")))}
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, UnreadableFile):
            raise
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UnreadableFile(
            path, f"a {NAMES[kind]} file whose header does not describe its tensors ({why})"
        ) from error
    return Stored(path, NAMES[kind], tensors, numbers)


def _statistics(stored: Stored, entries: list[dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Number]]:
    """A and S of K-FAC, A of a covariance: the sums over positions and loss terms become means."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Number] = {}
    for entry in entries:
        name, scale = entry["layer"]["name"], entry["scale"]
        for key, role, divisor in (
            (f"{name}/A", "A", scale["positions"]),
            (f"{name}/S", "S", scale["terms"]),
            (name, "A", scale["positions"]),
        ):
            if key in stored.tensors:
                tensors[f"{name}/{role}"] = _mean(stored.path, stored.tensors[key], divisor)
        numbers |= {f"{name}/N": int(scale["positions"]), f"{name}/loss_terms": int(scale["terms"])}
        numbers[f"{name}/bias_joined"] = int(entry["layer"]["bias"])
    return tensors, numbers


def _mean(path: Path, total: Tensor, count: int) -> Tensor:
    if int(count) < 1:
        raise ValueError(f"a sum over {count}")
    require_memory(path, total.numel() * total.itemsize, "dividing its sums by their counts")
    return total / int(count)


ROLES = {"u_in": "U_in", "u_out": "U_out", "values": "eigenvalues", "curvature": "eigenvalues", "vectors": "vectors"}


def _bases(stored: Stored, entries: list[dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Number]]:
    """Eigenvectors, eigenvalues and masks, one block a layer (Kronecker) or one over several (dense)."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Number] = {}
    for i, entry in enumerate(entries):
        name = "+".join(layer["name"] for layer in entry["layers"])
        own = {key.removeprefix(f"{i}."): t for key, t in stored.tensors.items() if key.startswith(f"{i}.")}
        for key, role in ROLES.items():
            if key in own:
                tensors[f"{name}/{role}"] = own[key]
        if "removed" in own:
            tensors[f"{name}/mask"] = _whole(stored.path, ~own["removed"], entry)
        for key in ("energy", "threshold"):
            if f"{i}.{key}" in stored.numbers:
                numbers[f"{name}/{key}"] = stored.numbers[f"{i}.{key}"]
        if any(len(t) != t.shape[1] for key, t in own.items() if key in ("u_in", "u_out", "vectors")):
            numbers[f"{name}/truncated"] = 1
        numbers[f"{name}/bias_joined"] = int(any(layer["bias"] for layer in entry["layers"]))
    return tensors, numbers


def _whole(path: Path, kept: Tensor, entry: dict[str, Any]) -> Tensor:
    """A mask over W's shape (dense: over all parameters): directions outside of a truncated basis are kept."""
    layer = entry["layers"][0]
    sizes = [sum(int(each["d_out"]) * int(each["d_in"]) for each in entry["layers"])]
    if entry["basis"] == "KroneckerBasis":
        sizes = [int(layer["d_out"]), int(layer["d_in"])]
    missing = [size - own for size, own in zip(sizes, kept.shape[-len(sizes) :], strict=True)]
    if min(missing) < 0:
        raise ValueError(f"a mask {tuple(kept.shape)} over {sizes}")
    if max(missing) == 0:
        return kept
    require_memory(path, math.prod(sizes), "its mask")
    return F.pad(kept, [n for own in reversed(missing) for n in (0, own)], value=True)


def _scales(scales: dict[str, dict[str, int]]) -> dict[str, Number]:
    numbers: dict[str, Number] = {}
    for name, scale in scales.items():
        numbers |= {f"{name}/N": int(scale["positions"]), f"{name}/loss_terms": int(scale["terms"])}
    return numbers


def _entries(content: Any) -> list[tuple[str, Number]]:
    """Of a JSON object, the plain ones; nested ones as their JSON."""
    if not isinstance(content, dict):
        return []
    return [
        (str(name), value if isinstance(value, int | float | str) else number(json.dumps(value)))
        for name, value in content.items()
        if value is not None
    ]
