"""Fault classes of what is made of the factors: masks, projectors and updates."""

import numpy as np
import torch
from torch import Tensor

from curvlab.crosscheck.artefacts import Run, projector, threshold
from curvlab.crosscheck.fault_classes import CACHED, ERROR, NAMED, VISIBLE, NoDifference, coin, fault

NOTICEABLE = 0.05  # of all directions: not a few whose order the rounding of float32 factors leaves open


@fault("stale-mask", "Eigenvectors and mask are those of earlier factors, since when these have turned.",
       ERROR, "cache", CACHED)  # fmt: skip
def _stale(run: Run) -> None:
    def turned(C: Tensor) -> Tensor:
        K = torch.randn(C.shape, generator=run.generator, dtype=torch.float64)
        R = torch.linalg.matrix_exp(0.4 * (K - K.mT) / len(C) ** 0.5)
        return R @ C @ R.mT

    run.A, run.S = turned(run.A), turned(run.S)


@fault("wrong-end-threshold", "The energy is summed from the smallest products, so that M keeps the sharp directions.",
       ERROR, "cache", CACHED)  # fmt: skip
def _wrong_end(run: Run) -> None:
    if coin(run):
        run.kept = ~run.kept
        return
    ordered = run.products.flatten().sort().values
    rank = int(torch.searchsorted(ordered.cumsum(0) / ordered.sum(), run.gamma).clamp(max=len(ordered) - 1))
    run.kept = run.products >= ordered[rank]


@fault("non-strict-threshold", "M keeps products ≤ the threshold instead of <, so that less than γ is removed.",
       VISIBLE, "cache", CACHED, gamma=True)  # fmt: skip
def _non_strict(run: Run) -> None:
    level = threshold(run.products, run.gamma)
    run.kept = run.products <= level * (1 + (1e-5 if run.tied else 0.0))
    if bool(run.kept.all()):
        raise NoDifference("only one eigenspace is removed: that nothing is, is another fault (mask-all-kept)")


@fault("ties-cut", "The first k products in sorted order are removed, which cuts an eigenspace of equal ones in two.",
       NAMED, "cache", CACHED)  # fmt: skip
def _ties(run: Run) -> None:
    removed = (~run.kept).flatten().nonzero().flatten()
    values = run.products.flatten()[removed]
    edge = removed[values <= values.min() * (1 + 2e-5)]
    if not run.tied or len(edge) < 2:
        raise NoDifference("no two products are equal where γ cuts")
    kept = run.kept.flatten().clone()
    kept[edge[: len(edge) // 2]] = True
    run.kept = kept.view(run.shape)


@fault("unsorted-eigenvalues", "On one side the mask takes the eigenvalues in the opposite order of the eigenvectors.",
       ERROR, "cache", CACHED)  # fmt: skip
def _unsorted(run: Run) -> None:
    if min(int((v > 1e-6 * v.max()).sum()) for v in (run.values_in, run.values_out)) < 2:
        raise NoDifference("with one eigenvalue above zero, M is that of the wrong end in any other order")
    run.kept = run.kept.flip(int(coin(run)))  # one side: with both, M is that of the wrong end


@fault(
    "wrong-gamma", "The mask was made for another γ than the one that is said.", VISIBLE, "cache", CACHED, gamma=True
)
def _wrong_gamma(run: Run) -> None:
    other = 0.65 if run.gamma > 0.8 else 0.93  # not near 1 − γ, which would look like the wrong end
    correct, slack = run.kept, 1e-5 if run.tied else 0.0
    run.kept = run.products < threshold(run.products, other) * (1 - slack)
    loose = run.products <= threshold(run.products, run.gamma) * (1 + slack)
    if torch.equal(run.kept, loose) and not torch.equal(run.kept, correct):
        raise NoDifference("this γ removes one eigenspace less: the same mask as that of another fault")


@fault("float32-energy", "The rank is found by adding the sorted products one by one in float32.",
       VISIBLE, "cache", CACHED, gamma=True)  # fmt: skip
def _float32_energy(run: Run) -> None:
    if run.tied:
        raise NoDifference("with ties the cut is that of a whole eigenspace either way")
    ordered = run.products.flatten().sort(descending=True).values
    exact = (ordered.cumsum(0) / ordered.sum()).numpy()
    sums = np.add.accumulate(ordered.float().numpy(), dtype=np.float32)
    most = 0
    for gamma in (1 - 10 ** -np.arange(1.0, 6.0, 0.05)).tolist():
        rank = int(np.searchsorted(sums, np.float32(gamma) * sums[-1]))
        short = int(np.searchsorted(exact, gamma)) - rank
        if abs(short) > most:
            most, run.gamma, run.kept = abs(short), gamma, run.products < ordered[rank]
    if most >= NOTICEABLE * len(ordered):
        return
    raise NoDifference("float32 finds the energy that float64 finds, up to the rounding of the factors themselves")


@fault("mask-all-kept", "M keeps every direction, so that nothing is projected away.", ERROR, "cache", CACHED)
def _all_kept(run: Run) -> None:
    run.kept = torch.ones_like(run.kept)


@fault(
    "mask-all-removed",
    "M removes every direction, so that no edit can happen (which a γ near 1 asks for).",
    NAMED,
    "cache",
    CACHED,
)
def _all_removed(run: Run) -> None:
    run.kept = torch.zeros_like(run.kept)


@fault("other-rule", "The threshold is on sums λ_i + λ_j, or γ is applied to each factor alone.",
       VISIBLE, "cache", CACHED)  # fmt: skip
def _other_rule(run: Run) -> None:
    inner, outer = run.values_in.clamp_min(0), run.values_out.clamp_min(0)
    if coin(run):
        sums = outer[:, None] + inner
        run.kept = sums < threshold(sums, run.gamma) * (1 - (1e-5 if run.tied else 0.0))
    else:
        slack = 1 - (1e-5 if run.tied else 0.0)
        columns, rows = (values < threshold(values, run.gamma) * slack for values in (inner, outer))
        run.kept = rows[:, None] & columns
    if min(int((~run.kept).sum()), int(run.kept.sum())) < 2 or _by_products(run):
        raise NoDifference("some threshold of the products, in some order, gives this mask too")


def _by_products(run: Run) -> bool:
    """Whether the mask is a threshold of products, as they lie or in an order that another fault would give them."""
    kept = [run.kept, ~run.kept]
    kept += [one.mT for one in kept] if run.shape[0] == run.shape[1] else []
    orders = [run.products.flip(dims) for dims in ((), (0,), (1,), (0, 1))]
    top = float(run.products.max())
    round_off, near = 1e-6 * top, 1e-4 * top  # within which float32 factors leave products' order open
    return any(
        float(products[one].max())
        <= float(products[~one].min()) + max(round_off, min(near, 1e-3 * float(products[one].max())))
        for products in orders
        for one in kept
    )


# --- projectors ------------------------------------------------------------------------------------------------------


@fault("projector-not-idempotent", "P fades directions out by a ridge instead of cutting them.",
       VISIBLE, "cache", ("alphaedit",))  # fmt: skip
def _ridge(run: Run) -> None:
    level = float(run.values_in.max()) * 0.1
    run.P = (run.u_in * (level / (level + run.values_in.clamp_min(0)))) @ run.u_in.mT


@fault("projector-not-symmetric", "P projects along a slant: P² = P, but P ≠ Pᵀ.", VISIBLE, "cache", ("alphaedit",))
def _oblique(run: Run) -> None:
    K = torch.randn(run.P.shape, generator=run.generator, dtype=torch.float64) / len(run.P) ** 0.5
    run.P = run.P + run.P @ K @ (torch.eye(len(run.P), dtype=torch.float64) - run.P)


@fault("projector-wrong-end", "P keeps the directions of large eigenvalues and removes the null space.",
       ERROR, "cache", ("alphaedit",))  # fmt: skip
def _wrong_side(run: Run) -> None:
    run.P = torch.eye(len(run.P), dtype=torch.float64) - run.P


@fault("projector-output-side", "P is made of the output factor: it belongs on the other side of W.",
       ERROR, "cache", ("alphaedit",))  # fmt: skip
def _output_side(run: Run) -> None:
    if run.shape[0] == run.shape[1]:
        raise NoDifference("of sides of equal size only S could tell, which this storage lacks")
    run.P = projector(run.u_out, run.values_out, run.gamma)


# --- updates ---------------------------------------------------------------------------------------------------------


@fault("update-outside-subspace", "The step was not projected.", ERROR, "update", ("edit",))
def _unprojected(run: Run) -> None:
    removed = int((~run.kept).sum())
    inside, whole = (float(t.square().sum()) for t in (run.project(run.gradient), run.gradient))
    # energy outside to inside, of random directions: removed to kept, and five standard deviations of the few
    chance = removed / max(run.kept.numel() - removed, 1) * (1 + 5 / (2 * max(removed, 1)) ** 0.5) ** 2
    if (whole - inside) < chance * inside:
        raise NoDifference("so little is removed that a step outside looks like one whose direction is random")
    run.edited = run.base - 0.5 * run.gradient


@fault("update-weight-decay", "Weight decay shrinks the weights beside the projected steps.",
       VISIBLE, "update", ("edit",))  # fmt: skip
def _decay(run: Run) -> None:
    if int((~run.kept).sum()) < 6:
        raise NoDifference("in so few removed directions any step outside has nearly the weights' direction")
    run.edited = run.edited - 0.03 * run.base


@fault("update-adam-leak", "Adam rescales the projected gradient entry by entry, which leads out of the subspace.",
       NAMED, "update", ("edit",))  # fmt: skip
def _adam(run: Run) -> None:
    W, mean, square = run.base.clone(), torch.zeros_like(run.base), torch.zeros_like(run.base)
    rate = 0.003 * run.base.square().mean().sqrt()
    for step in range(1, 21):
        g = run.project(W - (run.base - run.gradient))
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g**2
        W -= rate * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    run.edited = W
