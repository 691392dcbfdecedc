"""Claim 8: {ΔW : ΔW aⁱ = 0} ⊆ Null(A ⊗ S) ⊆ Null(G), and the approximations of S or A that break it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.curvature import KFAC
from curvlab.layers import MatrixLayer, find_layers
from curvlab.losses import Loss
from curvlab.spectrum import KroneckerBasis
from curvlab.theory import explicit
from curvlab.theory.check import Case, Findings, claim, control, roundoff
from curvlab.theory.setting import Setting


@claim(8, "ours")
def sandwich(
    model: nn.Module, loss: Loss, data: Any, layers: str | Sequence[str] = "*", *, seed: int = 0, **kfac: Any
) -> Findings:
    """Layer by layer {ΔW : ΔW aⁱ = 0 for all i} ⊆ Null(A ⊗ S) ⊆ Null(G), with S from H_ŷ in full and, where a weight is
    shared, the expand form.

    ΔW aⁱ = 0 for all i is ΔW A = 0, hence (A ⊗ S) vec ΔW = vec(S ΔW A) = 0. Each gradient row behind G is Σ_t g_t a_tᵀ
    with g_t in range(S) and a_t in range(A), so range(G) ⊆ range(A) ⊗ range(S). With numbers, and free of any rank:
    in an eigenvector u_out u_inᵀ of A ⊗ S the GGN is at most M λ^out λ^in, M the number of positions (Cauchy–Schwarz).
    As G ⪰ 0, vᵀGv = 0 says that Gv = 0; the share of tr G in a subspace measures how far it is from null.

    Control: as many random directions as Null(A ⊗ S) has are not null.

    Args:
        kfac: other arguments of `KFAC.fit` than labels="exact", sharing="expand".
    """
    generator = torch.Generator().manual_seed(seed)
    cases, wrong, series = [], [], {}
    for layer in find_layers(model, layers):
        view = _View.of(model, loss, data, layer, **({"labels": "exact", "sharing": "expand"} | kfac))
        eps = roundoff(view.dtype, layer.size)
        series[layer.name] = {"unseen": view.unseen, "null of K-FAC": int(view.null.sum()), "parameters": layer.size}
        if view.energy > 0:
            limit = view.positions * view.values + eps * view.energy
            cases.append(Case(f"{layer.name}: GGN / (M λ), largest", float((view.seen / limit).max()), 1.0))
        if view.unseen:
            cases.append(Case(f"{layer.name}: ΔW aⁱ = 0, share of tr(A ⊗ S)", view.unseen_energy, eps))
        if bool(view.null.any()) and view.energy > 0:
            bound = view.positions * float(view.values[view.null].sum()) / view.energy + eps
            cases.insert(0, Case(f"{layer.name}: Null(A ⊗ S), share of tr G", view.leak, bound))
            random = torch.randn(layer.size, int(view.null.sum()), generator=generator, dtype=torch.float64)
            Q = torch.linalg.qr(random)[0]
            wrong.append(
                control(f"{layer.name}: random directions", float((Q * (view.G @ Q)).sum()) / view.energy, bound)
            )
    return Findings(cases + wrong, series)


VARIANTS: dict[str, dict[str, Any]] = {
    "empirical S": {"labels": "data", "sharing": "expand"},
    "one model draw": {"labels": "model", "draws": 1, "sharing": "expand"},
    "reduce form": {"labels": "exact", "sharing": "reduce"},
}


@claim(8, "ours")
def sandwich_breaks(variant: str, settings: Iterable[Callable[[], Setting]], *, share: float = 1e-3) -> Findings:
    """Null(A ⊗ S) ⊆ Null(G) has counterexamples where S is not from H_ŷ in full or the form is not expand: with labels
    of the data, few draws of the model, or reduce there are settings with directions that K-FAC holds to be flat and
    the GGN does not.

    One gradient an example spans one direction where H_ŷ has C − 1: with fewer examples than outputs of the layer S
    loses rank. The reduce form keeps an example's mean input alone, and the sum of its gradients: what cancels over
    positions is lost. The settings are searched for the first counterexample.

    Control: none is needed, the exact form is checked on the same counterexample and must pass.

    Args:
        variant: a key of `VARIANTS`.
        settings: makers of the settings to search.
        share: of tr G inside Null(A ⊗ S) that counts as a counterexample.
    """
    largest, tried, found = 0.0, 0, None
    for make in settings:
        setting = make()
        for layer in find_layers(setting.model, setting.layers):
            tried += 1
            view = _View.of(setting.model, setting.loss, setting.data, layer, **VARIANTS[variant])
            if view.leak > largest:
                largest, found = view.leak, (setting, layer)
        if largest > share:
            break
    if found is None:
        raise ValueError(f"{variant}: no counterexample in {tried} layers, not even a direction without curvature")
    setting, layer = found
    exact = _View.of(setting.model, setting.loss, setting.data, layer, labels="exact", sharing="expand")
    where = f"{setting.name}, {layer.name}"
    return Findings(
        [
            Case(f"{variant}: Null(A ⊗ S), share of tr G", largest, share, should=False),
            Case("exact, expand, on the same", exact.leak, exact.positions * roundoff(exact.dtype, layer.size)),
        ],
        {"counterexample": where, "layers tried": tried, "share": largest},
    )


@dataclass(frozen=True)
class _View:
    """One layer's exact GGN, computed without the library, seen from the library's K-FAC.

    Attributes:
        G: the GGN (p, p), float64, layout "rows".
        values: eigenvalues of A ⊗ S; `seen`: the GGN's quadratic form in their eigenvectors; `null`: which are zero.
        positions: at which the weight was used; `unseen`: dimensions of {ΔW : ΔW aⁱ = 0}.
        unseen_energy: share of tr(A ⊗ S) there.
    """

    G: Tensor
    values: Tensor
    seen: Tensor
    null: Tensor
    positions: int
    unseen: int
    unseen_energy: float
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module, loss: Loss, data: Any, layer: MatrixLayer, **kfac: Any) -> "_View":
        G = explicit.gauss_newton(model, loss, data, [layer])
        fitted = KFAC.fit(model, loss, data, layer.name, **kfac)
        (block,) = fitted.spectrum().blocks
        basis, values = block.basis, block.values.flatten()
        assert isinstance(basis, KroneckerBasis)
        unit = torch.eye(layer.size, dtype=torch.float64).unflatten(1, basis.shape)
        vectors = basis.rotate_back(unit)[layer.name].flatten(1)  # one eigenvector a row
        a = explicit.layer_inputs(model, layer, data).double()
        _, singular, right = torch.linalg.svd(a, full_matrices=True)
        rank = int((singular > roundoff(G.dtype, layer.d_in) * float(singular.max())).sum())
        A = fitted.factors[layer.name].A.double()
        blind = right[rank:]
        return cls(
            G=G.double(),
            values=values,
            seen=(vectors * (vectors @ G.double())).sum(1),
            null=values <= roundoff(G.dtype, layer.size) * float(values.max()),
            positions=len(a),
            unseen=layer.d_out * len(blind),
            unseen_energy=float((blind * (blind @ A)).sum() / A.trace().clamp_min(1e-300)),
            dtype=G.dtype,
        )

    @property
    def energy(self) -> float:
        """tr G."""
        return float(self.G.trace())

    @property
    def leak(self) -> float:
        """Share of tr G in Null(A ⊗ S)."""
        return float(self.seen[self.null].sum()) / self.energy if self.energy > 0 else 0.0
