"""A reference in return: curvlab's factors and null spaces in the format of the authors' implementation, and back.

How the scales correspond. The authors keep A = Σ a aᵀ / N and B = Σ g gᵀ / N with g of the sum-reduced loss and N the
tokens of their run, all of which carry a loss. Here A is a mean over positions and S = Σ g gᵀ per *loss term*
(`curvlab.curvature.kfac.Factors`); where every position carries a loss, as in theirs, the two are the same. B is S
always, so that A ⊗ B approximates the Gauss-Newton matrix of the mean loss; N is the number of loss terms, by which
their sequential merge (Σ A_i N_i) / (Σ N_i) weighs. Masks and projections do not see the scale of either factor.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from curvlab.crosscheck.formats.refusal import UnreadableFile
from curvlab.crosscheck.parts import Stored
from curvlab.crosscheck.readers import read
from curvlab.curvature.kfac import KFAC, Factors
from curvlab.layers import LayerShape
from curvlab.losses import Scale
from curvlab.memory import announce, bytes_of
from curvlab.projector import NullBlock, NullSpace
from curvlab.spectrum import KroneckerBasis
from curvlab.storage import replacing

FILE_NAME = re.compile(r"(?P<layer>.+)_float32_kfac_(?P<n>\d+)\.npz")


def save_authors_factors(kfac: KFAC, folder: str | Path, *, model: str, dataset: str, n: int) -> list[Path]:
    """Write {folder}/{model}/{dataset}_stats/{layer}_float32_kfac_{n}.npz, a torch zip {'A', 'B', 'N'} a layer.

    Args:
        kfac: factors with sharing="expand", without joint biases: the authors' have neither.
        model: as the production run names it; "/" becomes "_", as in the caches of ROME and its successors.
        dataset: "wikipedia", …
        n: documents asked for; part of the name only. N in the file is the number of loss terms.

    Returns:
        The files, in the order of the layers. A (d_in, d_in) and B (d_out, d_out) are float32.

    Raises:
        ValueError: factors that the format cannot hold, or a name that is none.
    """
    if kfac.sharing != "expand":
        raise ValueError("the authors' factors take positions as independent; fit with sharing='expand'")
    _refuse_biases([f.layer for f in kfac.factors.values()])
    if n < 1:
        raise ValueError(f"n must be a number of documents, at least 1, got {n}")
    target = Path(folder) / _name("model", model) / f"{_name('dataset', dataset)}_stats"
    written = []
    for name, own in kfac.factors.items():
        if own.scale.terms < 1 or own.scale.positions < 1:
            raise ValueError(f"{name}: the factors are of no data (scale {own.scale})")
        path = target / f"{_name('layer', name)}_float32_kfac_{n}.npz"
        content = {"A": _stored(own.A, torch.float32), "B": _stored(own.S, torch.float32), "N": own.scale.terms}
        _save(content, path)
        written.append(path)
    return written


def load_authors_factors(paths: str | Path | Sequence[str | Path]) -> KFAC:
    """The authors' factor files, or folders of them, as K-FAC factors; layer names come from the file names.

    They are of the data's own labels (the empirical Fisher) with independent positions, at weights that they do not
    name. Sums are restored from the means and N, so that `KFAC.merge` weighs as the authors do.

    Raises:
        UnreadableFile: files that are damaged or hold something else.
        ValueError: two files of one layer.
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    factors: dict[str, Factors] = {}
    for stored in (stored for path in given for stored in read(Path(path))):
        own = _factors(stored)
        if own.layer.name in factors:
            raise ValueError(f"{stored.path}: a second file of layer {own.layer.name!r}; load them apart and merge")
        factors[own.layer.name] = own
    return KFAC(factors, labels="data", sharing="expand")


def save_authors_cache(null_space: NullSpace, path: str | Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a projection cache: a torch zip {"<layer>.weight": {'Ua', 'Ub', 'M'}}, one entry a layer.

    Ua (d_in, d_in) and Ub (d_out, d_out) hold eigenvectors in columns, M (d_in, d_out) is true where a direction is
    kept; the authors' step Ub @ ((Ub.T @ G @ Ua) * M.T) @ Ua.T is `null_space.project`, to round-off of `dtype`. For
    GPT-2's Conv1D, whose weight is (d_in, d_out), G is the gradient's transpose.

    A null space that holds only the eigenvectors it removes gets an orthonormal completion, kept throughout; that of
    an activation covariance has Ub = I.

    Args:
        dtype: of the eigenvectors; the authors' are float32.

    Raises:
        ValueError: a dense basis (Hessian, GGN), joint biases, or a stack of runs.
        MemoryError: eigenvectors that cannot fit.
    """
    path = Path(path)
    if not dtype.is_floating_point:
        raise ValueError(f"eigenvectors need a floating-point dtype, got {dtype}")
    _refuse_biases(null_space.layers)
    content = {}
    for block in null_space.blocks:
        basis = block.basis
        if not isinstance(basis, KroneckerBasis):
            names = ", ".join(layer.name for layer in basis.layers)
            raise ValueError(f"{names}: a dense basis has no Ua and Ub; the authors' caches hold K-FAC's null spaces")
        if block.removed.dim() != 2:
            raise ValueError(f"{basis.layer.name}: a stack of runs has several masks; save the null space of one run")
        content[f"{basis.layer.name}.weight"] = _cache(basis, block, dtype)
    _save(content, path)
    return path


def _cache(basis: KroneckerBasis, block: NullBlock, dtype: torch.dtype) -> dict[str, Tensor]:
    d_out, d_in = basis.layer.d_out, basis.layer.d_in
    size = 3 * bytes_of(d_in, d_in, dtype=basis.u_in.dtype) + 3 * bytes_of(d_out, d_out, dtype=basis.u_in.dtype)
    announce(f"the projection cache of {basis.layer.name}", size, "save the layers one by one", basis.u_in.device)
    kept = torch.ones(d_out, d_in, dtype=torch.bool)
    rows, columns = block.removed.shape
    kept[:rows, :columns] = ~block.removed.cpu()
    u_out = torch.eye(d_out, dtype=basis.u_in.dtype) if basis.u_out is None else _completed(basis.u_out)
    return {
        "Ua": _stored(_completed(basis.u_in), dtype),
        "Ub": _stored(u_out, dtype),
        "M": kept.mT.contiguous(),
    }


def _completed(vectors: Tensor) -> Tensor:
    """Orthonormal columns (d, r) and d − r more of their complement."""
    rank = vectors.shape[1]
    if rank == len(vectors):
        return vectors
    full = torch.linalg.qr(vectors, mode="complete").Q if rank else torch.eye(len(vectors)).to(vectors)
    return torch.cat([vectors, full[:, rank:]], dim=1)


def _factors(stored: Stored) -> Factors:
    path, A, B, N = stored.path, stored.tensors.get("A"), stored.tensors.get("B"), stored.numbers.get("N")
    if A is None or B is None or N is None:
        found = sorted({*stored.tensors, *stored.numbers})
        raise UnreadableFile(path, f"it holds {found}; a torch zip of the authors' A, B and N was expected")
    for name, factor in (("A", A), ("B", B)):
        if factor.dim() != 2 or factor.shape[0] != factor.shape[1] or not factor.is_floating_point():
            shape = f"{tuple(factor.shape)} of {factor.dtype}"
            raise UnreadableFile(path, f"{name} is {shape}; a square matrix of floats was expected")
        if not factor.numel() or not bool(factor.isfinite().all()):
            raise UnreadableFile(path, f"{name} is empty or has entries that are not finite")
    if isinstance(N, str) or not 1 <= N < math.inf or int(N) != N:
        raise UnreadableFile(path, f"N is {N!r}; the number of tokens behind the factors was expected")
    named = FILE_NAME.fullmatch(path.name)
    layer = LayerShape(named["layer"] if named else path.stem, len(B), len(A), bias=False)
    A, B = (factor if factor.dtype == torch.float64 else factor.float() for factor in (A, B))
    return Factors(layer, A * int(N), B * int(N), Scale(terms=int(N), positions=int(N)))


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()


def _save(content: object, path: Path) -> None:
    with replacing(path) as temporary:
        torch.save(content, temporary)


def _refuse_biases(layers: Sequence[LayerShape]) -> None:
    joint = [layer.name for layer in layers if layer.bias]
    if joint:
        raise ValueError(
            f"{joint} have their biases joined, which the authors' format does not know; fit with bias=False"
        )


def _name(what: str, name: str) -> str:
    """As part of a file name."""
    plain = name.replace("/", "_").strip()
    if not plain or plain.startswith(".") or not plain.isprintable():
        raise ValueError(f"{what} must be a name that a file can bear, got {name!r}")
    return plain
