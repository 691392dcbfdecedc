"""Claim 11: when K-FAC equals the GGN, and that EK-FAC is the best diagonal in K-FAC's basis."""

from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvlab.curvature import EKFAC, KFAC
from curvlab.layers import MatrixLayer, find_layers
from curvlab.losses import CrossEntropy, Loss, SquaredError
from curvlab.spectrum import KroneckerBasis
from curvlab.theory import explicit
from curvlab.theory.check import Case, Findings, claim, control, relative, roundoff
from curvlab.theory.factors import kfac_factors

Sharing = Literal["expand", "reduce"]


@claim(11, "Martens & Grosse 2015")
def kfac_exact_one_example(model: nn.Module, loss: Loss, data: Any, layers: str | Sequence[str] = "*") -> Findings:
    """On one example K-FAC equals the GGN of every layer whose weight is used once an example.

    s = W a gives J = J_s (I ⊗ aᵀ), so that G = (J_sᵀ H_ŷ J_s) ⊗ a aᵀ (row-major): one Kronecker product.
    A sum of several such terms is none in general. Layers whose weight is used at several positions are left out.

    Control: the factors in the wrong order; K-FAC of a tenth more.

    Args:
        data: its first example is taken.
    """
    example = [(x[:1], y[:1]) for x, y in data][:1]
    cases: list[Case] = []
    for layer in find_layers(model, layers):
        if len(explicit.layer_inputs(model, layer, example)) > 1:
            continue
        S, A = _factors(model, loss, example, layer)
        cases = _compare(layer, S, A, explicit.gauss_newton(model, loss, example, [layer])) + cases
    return Findings(cases)


@claim(11, "Bernacchia et al. 2018")
def kfac_exact_shared_curvature(model: nn.Module, data: Any, layers: str | Sequence[str] = "*") -> Findings:
    """Where all examples share one output curvature, a deep linear network with squared error, K-FAC is the GGN.

    J_s and H_ŷ do not depend on the example, hence G = 1/N Σ S ⊗ a_n a_nᵀ = S ⊗ A.

    Control: the same network under cross-entropy, whose H_ŷ differs between examples; the factors in the wrong order.

    Args:
        model: linear in its inputs, each weight used once an example.
        data: two or more different inputs; targets shaped like the outputs.
    """
    cases: list[Case] = []
    for layer in find_layers(model, layers):
        S, A = _factors(model, SquaredError(), data, layer)
        cases = _compare(layer, S, A, explicit.gauss_newton(model, SquaredError(), data, [layer])) + cases
        classes = [(x, torch.zeros(len(x), dtype=torch.long)) for x, _ in data]
        S, A = _factors(model, CrossEntropy(), classes, layer)
        G = explicit.gauss_newton(model, CrossEntropy(), classes, [layer])
        name = f"{layer.name}: different examples under cross-entropy"
        cases.append(control(name, relative(torch.kron(S, A), G), roundoff(G.dtype, layer.size)))
    return Findings(cases)


@claim(11, "Martens & Grosse 2015, section 3.1")
def kfac_exact_independent(
    *, d_in: int = 4, d_out: int = 3, inputs: int = 5, curvatures: int = 4, seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Findings:  # fmt: skip
    """Where every input a meets every output curvature S, K-FAC is the GGN although both vary.

    The expectation of a product of independent factors is the product of expectations: E[S ⊗ a aᵀ] = E[S] ⊗ E[a aᵀ].
    Here ŷ = M_j W a_i over all pairs (i, j), so that S_j = M_jᵀ M_j under squared error.

    Control: each input with one curvature of its own, the same numbers otherwise; the factors in the wrong order.
    """
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(inputs, d_in, generator=generator).to(dtype)
    M = torch.randn(curvatures, d_out * d_out, generator=generator).to(dtype)
    model = _Gated(d_in, d_out).to(dtype)
    (layer,) = find_layers(model, "fc")
    pairs = torch.stack([torch.cat([a[i], M[j]]) for i, j in product(range(inputs), range(curvatures))])
    data = [(pairs, torch.zeros(len(pairs), d_out, dtype=dtype))]
    S, A = _factors(model, SquaredError(), data, layer)
    cases = _compare(layer, S, A, explicit.gauss_newton(model, SquaredError(), data, [layer]))
    if min(inputs, curvatures) > 1:
        n = min(inputs, curvatures)
        matched = [(torch.cat([a[:n], M[:n]], 1), torch.zeros(n, d_out, dtype=dtype))]
        S, A = _factors(model, SquaredError(), matched, layer)
        G = explicit.gauss_newton(model, SquaredError(), matched, [layer])
        cases.append(control("a curvature of its own", relative(torch.kron(S, A), G), roundoff(dtype, layer.size)))
    return Findings(cases)


@claim(11, "Eschenhagen et al. 2023")
def kfac_with_shared_weights(
    *, sizes: Sequence[int] = (4, 5, 3), positions: int = 3, examples: int = 6, seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Findings:  # fmt: skip
    """With shared weights, K-FAC of a deep linear network under squared error is exact in its own setting alone.

    "expand" takes positions as independent examples: exact where each position has its own output and loss term.
    "reduce" averages a and sums g over them: exact where the outputs are averaged before the loss. Each fails in the
    other's setting, where the sum over positions stands on the other side of the product.

    Control: the factors in the wrong order.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, positions, sizes[0], generator=generator).to(dtype)
    cases: list[Case] = []
    for mean, sharing in product((False, True), ("expand", "reduce")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _Positions(sizes, mean).to(dtype)
        data = [(x, torch.zeros_like(model(x)).detach())]
        matched = mean == (sharing == "reduce")
        setting = "outputs averaged over positions" if mean else "a loss at every position"
        for layer in find_layers(model, "*"):
            S, A = _factors(model, SquaredError(), data, layer, sharing)  # type: ignore[arg-type]
            G = explicit.gauss_newton(model, SquaredError(), data, [layer])
            bound = roundoff(dtype, layer.size)
            error = relative(torch.kron(S, A), G)
            case = Case(f"{layer.name}: {sharing}, {setting}: ‖K-FAC − G‖ / ‖G‖", error, bound, should=matched)
            cases = [case, *cases] if matched else [*cases, case]
            if matched and relative(torch.kron(A, S), torch.kron(S, A)) > 0.01:
                cases.append(control(f"{layer.name}: {sharing}, A ⊗ S for S ⊗ A", relative(torch.kron(A, S), G), bound))
    return Findings(cases)


@claim(11, "George et al. 2018")
def ekfac_best_diagonal(
    model: nn.Module,
    loss: Loss,
    data: Any,
    layers: str | Sequence[str] = "*",
    *,
    labels: Literal["exact", "data"] = "exact",
    bias: bool = False,
) -> Findings:
    """EK-FAC is the best diagonal in K-FAC's basis: nowhere farther from G than K-FAC, with G's own trace.

    ‖G − U D Uᵀ‖_F = ‖Uᵀ G U − D‖_F is least for D = diag(Uᵀ G U), whose entries are E[(U_outᵀ q U_in)²] over the
    gradients q of examples (summed over their positions), and whose sum is tr G. K-FAC's Λ_out ⊗ Λ_in is another D.

    Control: eigenvalues half as large again are farther from G; and their trace is not G's.

    Args:
        labels: of G, K-FAC and EK-FAC alike: "exact" (the GGN) or "data" (the empirical Fisher).
        bias: join the bias to W.
    """
    cases: list[Case] = []
    series = {}
    for layer in find_layers(model, layers, bias):
        if labels == "exact":
            G = explicit.gauss_newton(model, loss, data, [layer])
        else:
            q = explicit.loss_gradients(model, loss, data, [layer])
            G = q.mT @ q / explicit.terms(model, loss, data, [layer])
        bound, G = roundoff(G.dtype, layer.size), G.double()
        size, trace = float(torch.linalg.matrix_norm(G)), float(G.trace())
        if size == 0:
            continue
        kfac = KFAC.fit(model, loss, data, layer.name, labels=labels, bias=bias)
        (block,) = EKFAC.fit(model, loss, data, layer.name, labels=labels, bias=bias).spectrum().blocks
        basis, factors = block.basis, kfac.factors[layer.name]
        assert isinstance(basis, KroneckerBasis)
        assert basis.u_out is not None
        U, values = torch.kron(basis.u_out, basis.u_in).double(), block.values.double().flatten()
        K = torch.kron(factors.S, factors.A).double()
        error, of_kfac, more = (
            float(torch.linalg.matrix_norm(G - D)) / size
            for D in (U @ values.diag() @ U.mT, K, U @ (1.5 * values).diag() @ U.mT)
        )
        series[layer.name] = {
            "EK-FAC": error, "K-FAC": of_kfac, "tr EK-FAC / tr G": float(values.sum()) / trace,
            "tr K-FAC / tr G": float(K.trace()) / trace,
        }  # fmt: skip
        cases.insert(0, Case(f"{layer.name}: (‖G − EKFAC‖ − ‖G − KFAC‖) / ‖G‖", error - of_kfac, bound))
        diagonal = (U.mT @ G @ U).diagonal()
        cases += [
            Case(f"{layer.name}: EK-FAC's eigenvalues against diag(Uᵀ G U)", relative(values, diagonal), bound),
            Case(f"{layer.name}: tr EK-FAC against tr G", abs(float(values.sum()) / trace - 1), bound),
        ]
        if labels == "exact":  # the basis is that of K-FAC as defined, not merely some orthonormal one
            A, S = kfac_factors(model, loss, data, layer)
            cases.append(Case(f"{layer.name}: K-FAC against its definition", relative(K, torch.kron(S, A)), bound))
            rotated = U.mT @ torch.kron(S, A).double() @ U
            off = relative(rotated.diagonal().diag(), rotated)
            cases.append(Case(f"{layer.name}: A ⊗ S off the diagonal in EK-FAC's basis", off, bound))
        cases += [
            control(f"{layer.name}: eigenvalues × 1.5", more**2 - error**2, bound),
            control(f"{layer.name}: trace × 1.5", abs(1.5 * float(values.sum()) / trace - 1), bound),
        ]
    return Findings(cases, series)


def _factors(
    model: nn.Module, loss: Loss, data: Any, layer: MatrixLayer, sharing: Sharing = "expand"
) -> tuple[Tensor, Tensor]:
    found = KFAC.fit(model, loss, data, layer.name, labels="exact", sharing=sharing).factors[layer.name]
    return found.S, found.A


def _compare(layer: MatrixLayer, S: Tensor, A: Tensor, G: Tensor) -> list[Case]:
    bound = roundoff(G.dtype, layer.size)
    K = torch.kron(S, A)
    cases = [Case(f"{layer.name}: ‖K-FAC − G‖ / ‖G‖", relative(K, G), bound)]
    if not bool(G.any()):  # a dead unit: nothing to tell apart
        return cases
    cases.append(control(f"{layer.name}: K-FAC × 1.1", relative(1.1 * K, G), bound))
    if relative(torch.kron(A, S), K) > 0.01:  # they commute where one is a multiple of the other
        cases.append(control(f"{layer.name}: A ⊗ S for S ⊗ A", relative(torch.kron(A, S), G), bound))
    return cases


class _Gated(nn.Module):
    """ŷ = M W a for inputs (a, M row-major)."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.fc = nn.Linear(d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        s = self.fc(x[:, : self.fc.in_features])
        M = x[:, self.fc.in_features :].unflatten(1, (len(s[0]), len(s[0])))
        return torch.einsum("ncd,nd->nc", M, s)


class _Positions(nn.Module):
    """Linear layers at every position (N, T, d), and their mean over positions if asked."""

    def __init__(self, sizes: Sequence[int], mean: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(i, o) for i, o in pairwise(sizes)))
        self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return y.mean(1) if self.mean else y
