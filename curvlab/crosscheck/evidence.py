"""What a tensor shows by itself: symmetric, idempotent, orthonormal, zeros and ones, diagonalised by another.

Every measure costs a few products with a handful of columns, so that layers of 14336 inputs are told apart in seconds.
"""

import math

import torch
from torch import Tensor

PROBES = 64  # columns looked at; all of them where there are few
COARSE = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
BITS = {torch.bfloat16: 8, torch.float16: 11}  # of a mantissa
EIGHT_BITS = {"float8_e5m2": 0.25, "float8_e4m3": 0.125}  # relative steps: 2 and 3 bits of mantissa are stored
LEVELS = 12  # different values that whole numbers would not have: fewer come by chance


def usable(tensor: Tensor | None) -> bool:
    """Whether there are numbers to judge: not empty, real, all finite."""
    if tensor is None or tensor.numel() == 0 or tensor.is_complex():
        return False
    return bool(torch.isfinite(tensor).all())


def square(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1]


def coarse_dtype(tensor: Tensor) -> torch.dtype | None:
    """bfloat16 or float16 where all values are such numbers and there are enough different ones to tell."""
    if tensor.dtype in COARSE:
        return tensor.dtype
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return None
    some = tensor.flatten()[:: max(1, tensor.numel() // 100_000)]
    for dtype in (torch.bfloat16, torch.float16):
        if bool((some.to(dtype).to(some.dtype) == some).all()) and not _short_by_nature(some[some != 0], BITS[dtype]):
            return dtype if bool((tensor.to(dtype).to(tensor.dtype) == tensor).all()) else None
    return None


def _short_by_nature(values: Tensor, bits: int) -> bool:
    """Few different mantissas, or numbers on one grid (counts, fractions of them), as floating rounding leaves none."""
    mantissa, exponent = torch.frexp(values.double())
    whole = (mantissa.abs() * 2**bits).long()
    if len(whole.unique()) < 3 or not bool((whole % 2 == 1).any()):
        return True
    grid = torch.ldexp((whole & -whole).double(), exponent).min()  # in units of 2^-bits
    return float(values.double().abs().max() / grid) <= 1.0


def eight_bits(tensor: Tensor) -> str | None:
    """The 8-bit float whose digits all values have, up to powers of two; None for others and for whole numbers.

    Readers widen such tensors, so that their dtype no longer tells.
    """
    if not tensor.is_floating_point():
        return None
    values = tensor.flatten()[:: max(1, tensor.numel() // 100_000)].double().abs().unique()
    mantissa, exponent = torch.frexp(values[values > 0])
    for name, unit in EIGHT_BITS.items():
        whole = mantissa * (2 / unit)  # with the leading bit: 4 to 8, or 8 to 16
        if len(whole) < LEVELS or bool((whole != whole.round()).any()):
            continue
        units = whole.long()
        grid = float(torch.ldexp((units & -units).double() * (unit / 2), exponent).min())
        beyond = int((values > 2 / unit * grid).sum())  # where whole numbers on that grid would need more digits
        return name if beyond >= LEVELS and len(units.unique()) * unit > 0.5 else None
    return None


def as_short(tensor: Tensor, example: Tensor) -> Tensor:
    """The tensor with no more digits than `example` has."""
    coarse, short = coarse_dtype(example), eight_bits(example)
    if short is not None:
        scale = power_of_two(tensor) / 128  # into the range of the dtype
        dtype = torch.float8_e5m2 if short == "float8_e5m2" else torch.float8_e4m3fn
        return (tensor.double() / scale).to(dtype).to(tensor.dtype) * scale
    return tensor if coarse is None else tensor.to(coarse)


def power_of_two(C: Tensor) -> float:
    """The largest entry's, by which dividing is exact; 1 for zeros."""
    top = float(C.abs().max())
    return 2.0 ** max(math.frexp(top)[1] - 1, -1022) if top > 0 else 1.0


def precision(tensor: Tensor) -> float:
    """Unit of rounding of the values: of the dtype, or of a coarser one that they are all numbers of."""
    coarse = coarse_dtype(tensor)
    if coarse is not None:
        return COARSE[coarse]
    single = torch.finfo(torch.float32).eps
    if tensor.dtype == torch.float64 and (
        bool((tensor.float().double() == tensor).all()) or _summed_in_float32(tensor)
    ):
        return single
    return torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else single


def _summed_in_float32(C: Tensor) -> bool:
    """Whether a square matrix' triangles differ as float32 products leave them, though it was widened since."""
    if not square(C) or not usable(C):
        return False
    own, single = torch.finfo(torch.float64).eps, torch.finfo(torch.float32).eps
    return len(C) ** 0.5 * 64 * own < asymmetry(C) <= len(C) ** 0.5 * 8 * single


def probes(count: int) -> Tensor:
    """Indices of at most PROBES columns of `count`, evenly spread."""
    return torch.arange(count) if count <= 4 * PROBES else torch.linspace(0, count - 1, PROBES).long()


def asymmetry(C: Tensor) -> float:
    """max |C − Cᵀ| / max |C|."""
    top = float(C.abs().max())
    return float((C - C.mT).abs().max()) / top if top > 0 else 0.0


def orthonormal_defect(U: Tensor) -> float:
    """max |UᵀU − I| over all columns, against all where there are few and against a sample else."""
    U = U.float() if U.dtype in COARSE else U
    columns = probes(U.shape[1])
    gram = U.mT @ U[:, columns]
    gram[columns, torch.arange(len(columns))] -= 1
    return max(float(gram.abs().max()), float((U.square().sum(0) - 1).abs().max()))


def idempotent_defect(P: Tensor) -> float:
    """max |P² − P| over a sample of columns."""
    P = P.float() if P.dtype in COARSE else P
    some = P[:, probes(P.shape[1])]
    return float((P @ some - some).abs().max())


def zeros_and_ones(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bool or bool(((tensor == 0) | (tensor == 1)).all())


def semidefinite_looking(C: Tensor) -> bool:
    """|c_ij| ≤ √(c_ii c_jj) up to round-off: necessary, and cheap."""
    diagonal = C.diagonal().double()
    if float(diagonal.min()) < -1e-3 * float(diagonal.abs().max()):
        return False
    root = diagonal.clamp_min(0).sqrt().to(C.dtype)
    return bool((C.abs() <= root[:, None] * root + 1e-2 * diagonal.abs().max()).all())


def off_diagonal(U: Tensor, C: Tensor) -> float | None:
    """How far U is from diagonalising C: ‖CU − UΛ‖ over the norm of C without its mean; about 1 for any other basis.

    None where C has nothing to tell (a multiple of the identity), or shapes do not fit.
    """
    if C.dim() != 2 or U.dim() != 2 or C.shape[0] != C.shape[1] or C.shape[0] != U.shape[0] or not U.shape[1]:
        return None
    dtype = torch.float64 if len(C) <= 2048 else torch.float32
    C, columns = C.to(dtype), probes(U.shape[1])
    size = float(C.abs().max())
    if size == 0:
        return None
    mean = C.diagonal().mean() / size
    spread = float((C / size - torch.diag(mean.expand(len(C)))).norm())
    if spread <= 1e-4 * float((C / size).norm()):
        return None
    some = U[:, columns].to(dtype)
    some = some / some.norm(dim=0).clamp_min(1e-30)
    image = C @ some / size
    rest = image - some * (some * image).sum(0)
    return float(rest.norm()) / spread * (U.shape[1] / len(columns)) ** 0.5
