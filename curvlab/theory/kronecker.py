"""Claim 3 (Prop. 3): projecting with two small eigenbases is projecting with the one large one."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from curvlab.curvature import KFAC
from curvlab.curvature.kfac import Factors
from curvlab.layers import LayerShape, Matrices
from curvlab.losses import Scale
from curvlab.projector import NullBlock, NullSpace
from curvlab.spectrum import Basis, Block, KroneckerBasis, Spectrum
from curvlab.theory.check import Case, Findings, claim, control, relative, roundoff
from curvlab.theory.eigenspaces import Eigenspaces

Predicate = Callable[[Tensor], Tensor]  # eigenvalues as shares of the largest → which of them are kept
PREDICATES: dict[str, Predicate] = {
    "σ ≤ 0.31 σ₁": lambda share: share <= 0.31,
    "0.11 σ₁ < σ ≤ 0.63 σ₁": lambda share: (share > 0.11) & (share <= 0.63),
    "σ = 0": lambda share: share == 0,
    "no order: sin(97 σ/σ₁) > 0": lambda share: (97 * share).sin() > 0,
}
UNDECIDED = 1e-6  # eigenvalues so close that a projector between them has lost more digits than this


@claim(3, "paper, Prop. 3")
def kronecker_projection(
    A: Tensor,
    S: Tensor,
    *,
    predicates: Mapping[str, Predicate] = PREDICATES,
    gammas: Sequence[float] = (0.37, 0.71, 0.93, 0.997),
    ranks: Sequence[int] = (1, 2, 4),
) -> Findings:
    """U_out((U_outᵀ X U_in) ⊙ M)U_inᵀ, M_ij = ψ(λ_i^out λ_j^in), is the projection of vec X onto the eigenvectors of
    A ⊗ S whose eigenvalue satisfies ψ, for any predicate ψ.

    vec(u_out u_inᵀ) = u_in ⊗ u_out is an eigenvector of A ⊗ S with eigenvalue λ^out λ^in, and these are a basis; ψ
    takes whole eigenspaces, so that the basis does not matter. In row-major order the matrix is S ⊗ A. The explicit
    projector has error rounding / gap, the gap between the eigenvalues that ψ parts: that is the bound, and
    predicates that part eigenvalues too close for it are left out.

    Control: the factors in the other order; a projection that forgets a transpose.

    Args:
        A, S: factors (d_in, d_in) and (d_out, d_out), symmetric and positive semi-definite, of any rank.
        predicates: on eigenvalues as shares of the largest; they say what is kept.
        gammas: for the library's own null space, whose ψ is σ < σ_k.
        ranks: for the library's null space after k leading eigenvalues, where so many are positive.

    Raises:
        ValueError: a factor that is zero or has eigenvalues below zero by more than rounding.
    """
    _refuse_indefinite(A=A, S=S)
    A, S = A.double(), S.double()
    layer, spectrum = _spectrum(A, S)
    (block,) = spectrum.blocks
    spaces = {"vec": Eigenspaces.of(torch.kron(A, S)), "row-major": Eigenspaces.of(torch.kron(S, A))}
    dense = spaces["vec"]
    cases: list[Case] = []
    wrong: list[Case] = []
    cuts: list[tuple[str, NullSpace, Tensor | None]] = [
        (f"γ = {gamma}", spectrum.null_space(gamma), dense.below(gamma)) for gamma in gammas
    ]
    cuts += [(f"k = {k}", spectrum.null_space(k=k), dense.after(k)) for k in ranks if k <= layer.size]
    for name, null, left in cuts:
        if left is not None and dense.error(left) <= UNDECIDED:
            cases.append(Case(name, relative(projector_matrix(null, layer), dense.projector(left)), dense.error(left)))
    for name, predicate in predicates.items():
        keep = predicate(dense.shares)
        if dense.error(keep) > UNDECIDED:
            continue
        mask = keep[dense.nearest(block.values)]
        truths = {layout: space.projector(keep[dense.nearest(space.levels)]) for layout, space in spaces.items()}
        for layout, truth in truths.items():
            found = projector_matrix(keeping(block.basis, mask), layer, layout)
            cases.append(Case(f"{name}, {layout}", relative(found, truth), dense.error(keep)))
        if 0 < int(mask.sum()) < layer.size:
            wrong += _wrong(block.basis, mask, layer, truths, dense.error(keep))
    return Findings(
        cases + wrong, {"d_out": layer.d_out, "d_in": layer.d_in, "distinct eigenvalues": len(dense.levels)}
    )


def _wrong(basis: Basis, mask: Tensor, layer: LayerShape, truths: Mapping[str, Tensor], bound: float) -> list[Case]:
    """Controls, where they are wrong at all: 1 × n has no order of factors, a symmetric U no transpose."""
    assert isinstance(basis, KroneckerBasis)
    assert basis.u_out is not None
    truth, swapped, cases = truths["vec"], truths["row-major"], []
    if relative(swapped, truth) > 1e-3:
        found = projector_matrix(keeping(basis, mask), layer)
        cases.append(control("S ⊗ A in place of A ⊗ S", relative(found, swapped), bound))
    u, v = basis.u_out, basis.u_in
    if relative(u, u.mT) > 1e-3:
        forgot = _matrix(lambda X: u @ ((u @ X @ v) * mask) @ v.mT, layer, "vec")
        cases.append(control("U_out X U_in, its transpose forgotten", relative(forgot, truth), bound))
    return cases


@claim(3, "paper, Prop. 3")
def kronecker_projection_of_large_layers(
    A: Tensor, S: Tensor, *, cuts: Sequence[float] = (0.3, 0.0181, 0.0036), vectors: int = 3, seed: int = 0
) -> Findings:
    """The same for layers whose dense projector would not fit, on random matrices X: what exceeds a share of σ₁ goes.

    Eigenvectors and eigenvalues of the factors straight from LAPACK, and the four products written out. Beyond 128
    eigenvectors a side the library multiplies strips of them, none of which may be missing.

    Control: all that belongs to the last eigenvector of S removed too.

    Args:
        A, S: positive semi-definite factors.
        cuts: shares of the largest eigenvalue; the library is told how many exceed them.
    """
    A, S = A.double(), S.double()
    layer, spectrum = _spectrum(A, S)
    (a, U_in), (s, U_out) = torch.linalg.eigh(A), torch.linalg.eigh(S)
    values = s.clamp_min(0)[:, None] * a.clamp_min(0)
    shares = (values / values.max()).flatten().sort(descending=True).values
    X = torch.randn(vectors, *values.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    Z = U_out.mT @ X @ U_in
    cases: list[Case] = []
    wrong: list[Case] = []
    for cut in cuts:
        k = int((shares > cut).sum())
        bound = roundoff(A.dtype, layer.size) / max(float(shares[k - 1] - shares[k]), 1e-300) if k < len(shares) else 1
        if bound > UNDECIDED:
            continue
        mask = values <= cut * values.max()
        less = mask & (s > s[0])[:, None]  # ascending
        found = spectrum.null_space(k=k).project({layer.name: X})[layer.name]
        name = f"σ ≤ {cut} σ₁, {k} removed"
        cases.append(Case(name, relative(found, U_out @ (mask * Z) @ U_in.mT), bound))
        wrong.append(control(name, relative(found, U_out @ (less * Z) @ U_in.mT), bound))
    return Findings(cases + wrong, {"d_out": layer.d_out, "d_in": layer.d_in})


@claim(3, "paper, Prop. 3; ours")
def cut_inside_an_eigenspace(
    A: Tensor, S: Tensor, *, angle: float = math.pi / 4, gammas: Sequence[float] = (0.37, 0.71, 0.93)
) -> Findings:
    """Where whole eigenspaces are removed the projector is the same for every eigenbasis; a cut inside an eigenspace
    makes it depend on the basis.

    Turn two eigenvectors of one eigenvalue into each other by an angle: both bases are eigenbases. If the cut keeps
    one and removes the other, the two projectors differ by uuᵀ − u'u'ᵀ, whose norm is the sine of the angle. This is
    why the library removes ties whole.

    Control: a projector by rank alone, cut inside, is claimed to be the same for both bases.

    Args:
        A, S: positive semi-definite factors, one of which has a positive eigenvalue at least twice.
        angle: between the two choices of eigenvectors.
    """
    A, S = A.double(), S.double()
    layer, spectrum = _spectrum(A, S)
    (block,) = spectrum.blocks
    assert isinstance(block.basis, KroneckerBasis)
    assert block.basis.u_out is not None
    bound = roundoff(torch.float64, layer.size)
    sides = {"in": (A, block.basis.u_in), "out": (S, block.basis.u_out)}
    cases, wrong = [], []
    for side, (factor, u) in sides.items():
        i = _repeated(factor, u)
        if i is None or not float(block.values.max()) > 0:
            continue
        turned = _turn(u, i, angle)
        basis = replace(block.basis, u_in=turned) if side == "in" else replace(block.basis, u_out=turned)
        eigen = relative(factor @ turned, turned * (turned * (factor @ turned)).sum(0))
        cases.append(Case(f"turned basis, {side}: still eigenvectors", eigen, bound))
        other = Spectrum((Block(basis, block.values, block.total),))
        for gamma in gammas:
            pair = [projector_matrix(s.null_space(gamma), layer) for s in (spectrum, other)]
            name = f"whole eigenspaces, γ = {gamma}, {side}: ‖P − P'‖"
            cases.insert(0, Case(name, float(torch.linalg.matrix_norm(pair[0] - pair[1], 2)), bound))
        # all above the repeated eigenvalue, and the first of the two
        first = (0, i) if side == "in" else (i, 0)
        removed = block.values > float(block.values[first]) * (1 + 1e-9)
        removed[first] = True
        pair = [projector_matrix(keeping(b, ~removed), layer) for b in (block.basis, basis)]
        difference = pair[0] - pair[1]
        measured = float(torch.linalg.matrix_norm(difference, 2))
        cases.append(Case(f"cut inside, {side}: |‖P − P'‖ − sin|", abs(measured - math.sin(angle)), bound))
        wrong.append(control(f"cut inside, {side}, claimed independent of the basis", measured, bound))
    return Findings(cases + wrong, {"sine": math.sin(angle)})


def random_factor(eigenvalues: Sequence[float], seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues in a random basis, float64."""
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    U = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    return U * torch.tensor(eigenvalues, dtype=torch.float64) @ U.mT


def keeping(basis: Basis, mask: Tensor) -> NullSpace:
    """The library's projector onto the eigenvectors where `mask` is true."""
    return NullSpace((NullBlock(basis, ~mask, torch.tensor(0.0), torch.tensor(0.0)),), None)


def projector_matrix(null: NullSpace, layer: LayerShape, layout: str = "vec") -> Tensor:
    """The library's projector of one layer as a matrix (p, p), column-stacking ("vec") or row-major."""

    def project(X: Tensor) -> Tensor:
        delta: Matrices = {layer.name: X}
        return null.project(delta)[layer.name]

    return _matrix(project, layer, layout)


def _matrix(function: Callable[[Tensor], Tensor], layer: LayerShape, layout: str) -> Tensor:
    unit = torch.eye(layer.size, dtype=torch.float64)
    if layout == "vec":
        return function(unit.unflatten(1, (layer.d_in, layer.d_out)).mT).mT.flatten(1).mT
    return function(unit.unflatten(1, (layer.d_out, layer.d_in))).flatten(1).mT


def _refuse_indefinite(**factors: Tensor) -> None:
    for name, factor in factors.items():
        values = torch.linalg.eigvalsh(factor)
        largest, rounding = float(values.abs().max()), roundoff(factor.dtype, len(factor))
        if largest == 0 or float(values[0]) < -rounding * largest:
            raise ValueError(f"{name} must be positive semi-definite and not zero, its least eigenvalue is {values[0]}")


def _spectrum(A: Tensor, S: Tensor) -> tuple[LayerShape, Spectrum]:
    layer = LayerShape("w", len(S), len(A), False)
    return layer, KFAC({"w": Factors(layer, A, S, Scale(1, 1))}, "exact", "expand").spectrum()


def _repeated(factor: Tensor, u: Tensor) -> int | None:
    """The first of two neighbouring eigenvectors with one positive eigenvalue."""
    values = (u * (factor @ u)).sum(0)
    top = float(values.max())
    close = (values.diff().abs() <= roundoff(factor.dtype, len(factor)) * top) & (values[1:] > 1e-3 * top)
    return int(close.nonzero()[0]) if bool(close.any()) else None


def _turn(u: Tensor, i: int, angle: float) -> Tensor:
    """Columns i and i + 1 turned into each other."""
    c, s = math.cos(angle), math.sin(angle)
    turned = u.clone()
    turned[:, i], turned[:, i + 1] = c * u[:, i] + s * u[:, i + 1], c * u[:, i + 1] - s * u[:, i]
    return turned
