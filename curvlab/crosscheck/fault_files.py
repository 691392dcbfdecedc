"""Fault classes of how things are stored: swapped, transposed, rounded, damaged."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvlab.crosscheck.artefacts import File, Files, Run
from curvlab.crosscheck.fault_classes import CACHED, ERROR, FACTORED, MOMENTS, NAMED, VISIBLE, NoDifference, coin, fault


def _edited(files: Files, changes: dict[str, Callable[[Tensor], Tensor]]) -> Files:
    """The files with the tensors of these keys (or of these file stems) changed."""

    def change(name: str, file: File) -> File:
        if not isinstance(file.content, dict):
            return file
        stem = name.rsplit("/", 1)[-1].split(".")[0]
        content = {k: changes.get(k, changes.get(stem, lambda t: t))(v) if isinstance(v, Tensor) else v
                   for k, v in file.content.items()}  # fmt: skip
        return File(file.kind, content)

    return {name: change(name, file) for name, file in files.items()}


def _either(run: Run, function: Callable[[Tensor], Tensor], *groups: tuple[str, ...]) -> dict[str, Any]:
    """`function` for one group of keys, drawn."""
    chosen = groups[int(torch.randint(len(groups), (), generator=run.generator))]
    return dict.fromkeys(chosen, function)


INPUT = ("A", "mom2.mom2", "activation_covariance")
OUTPUT = ("B", "gradient_covariance")
INPUT_VECTORS = ("Ua", "activation_eigenvectors")
OUTPUT_VECTORS = ("Ub", "gradient_eigenvectors")


@fault("swapped-factors", "A is stored as B and B as A.", ERROR, "files", FACTORED)
def _swapped(run: Run, files: Files) -> Files:
    pairs = {"A": "B", "activation_covariance": "gradient_covariance"}
    pairs |= {b: a for a, b in pairs.items()}
    out = {}
    for name, file in files.items():
        stem = name.rsplit("/", 1)[-1].split(".")[0]
        if stem in pairs:
            file = files[name.replace(stem, pairs[stem])]
        elif isinstance(file.content, dict) and "B" in file.content:
            file = File(file.kind, {k: file.content[pairs.get(k, k)] for k in file.content})
        out[name] = file
    return out


@fault(
    "transposed-mask", "M is stored like W (d_out × d_in) where the format has its transpose.", NAMED, "files", CACHED
)
def _transposed_mask(run: Run, files: Files) -> Files:
    return _edited(files, {"M": lambda M: M.mT.contiguous()})


@fault("transposed-eigenvectors", "Eigenvectors of one side are stored in rows instead of columns.",
       ERROR, "files", FACTORED)  # fmt: skip
def _transposed_vectors(run: Run, files: Files) -> Files:
    return _edited(files, _either(run, lambda U: U.mT.contiguous(), INPUT_VECTORS, OUTPUT_VECTORS))


def _rounded(run: Run, run_keys: tuple[str, ...], files: Files) -> Files:
    """To bfloat16, kept in that dtype or widened again."""
    keep = coin(run) and all(file.kind != "numpy" for file in files.values())
    return _edited(files, dict.fromkeys(run_keys, lambda t: t.bfloat16() if keep else t.bfloat16().float()))


@fault("bfloat16-eigenvectors", "Eigenvectors are rounded to bfloat16: they are orthonormal to two digits only.",
       VISIBLE, "files", FACTORED)  # fmt: skip
def _bf16_vectors(run: Run, files: Files) -> Files:
    return _rounded(run, INPUT_VECTORS + OUTPUT_VECTORS, files)


@fault("bfloat16-factors", "Factors are rounded to bfloat16, which moves their small eigenvalues by any factor.",
       NAMED, "files", FACTORED + MOMENTS)  # fmt: skip
def _bf16_factors(run: Run, files: Files) -> Files:
    return _rounded(run, INPUT + OUTPUT, files)


@fault("float8-factors", "Factors went through 8-bit floats, which leave three bits of every number.",
       VISIBLE, "files", FACTORED + MOMENTS)  # fmt: skip
def _f8_factors(run: Run, files: Files) -> Files:
    def rounded(t: Tensor) -> Tensor:
        scale = 2.0 ** (8 - math.frexp(float(t.abs().max()))[1])  # into the range of the dtype
        short = (t * scale).to(torch.float8_e4m3fn).float() / scale
        if len(short.abs().unique()) < 40:
            raise NoDifference("so few numbers may be short by chance")
        return short

    return _edited(files, dict.fromkeys(INPUT, rounded))


@fault("wrong-dtype", "A was quantised to 8-bit integers.", ERROR, "files", FACTORED + MOMENTS)
def _quantised(run: Run, files: Files) -> Files:
    return _edited(files, dict.fromkeys(INPUT, lambda t: (t / t.abs().max() * 127).round().to(torch.int8)))


@fault("no-count", "N is zero or negative.", ERROR, "files", CACHED + MOMENTS)
def _no_count(run: Run, files: Files) -> Files:
    value = -run.count if coin(run) else 0

    def change(file: File) -> File:
        if not isinstance(file.content, dict):
            return file
        return File(file.kind, file.content | dict.fromkeys({"N", "mom2.count"} & file.content.keys(), value))

    return {name: change(file) for name, file in files.items()}


@fault("not-finite", "One entry of A is NaN or infinite.", ERROR, "files", FACTORED + MOMENTS)
def _not_finite(run: Run, files: Files) -> Files:
    value = float("nan") if coin(run) else float("inf")

    def spoil(A: Tensor) -> Tensor:
        A = A.clone()
        A[0, -1] = value
        return A

    return _edited(files, dict.fromkeys(INPUT, spoil))


@fault("empty-tensor", "A factor was stored without entries.", ERROR, "files", FACTORED + MOMENTS)
def _empty(run: Run, files: Files) -> Files:
    return _edited(files, _either(run, lambda t: t[:0, :0], INPUT, *([OUTPUT] if "B" in _keys(files) else [])))


def _keys(files: Files) -> set[str]:
    return {key for file in files.values() if isinstance(file.content, dict) for key in file.content}


@fault("mismatched-shapes", "A lacks a row and column: it does not fit its eigenvectors.", ERROR, "files", FACTORED)
def _mismatched(run: Run, files: Files) -> Files:
    return _edited(files, dict.fromkeys(INPUT, lambda A: A[:-1, :-1].contiguous()))


@fault(
    "eigenvalues-disagree",
    "Stored eigenvalues are not those of the stored factors.",
    VISIBLE,
    "files",
    ("kronfluence",),
)
def _disagree(run: Run, files: Files) -> Files:
    return _edited(files, _either(run, lambda v: v * torch.linspace(2.0, 0.5, len(v)),
                                  ("activation_eigenvalues",), ("gradient_eigenvalues",)))  # fmt: skip
