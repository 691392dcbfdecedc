"""Edits made under a constraint, and the ways in which they go wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from production import Run, gpt2, images, lenet, llama, produce, texts
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.crosscheck.capability import capability_change
from curvlab.crosscheck.conventions import Subject
from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.identify import identify
from curvlab.crosscheck.pairs import with_model
from curvlab.crosscheck.parts import Item, Part, Stored
from curvlab.crosscheck.updates import check, others
from curvlab.layers import find_layers, supported_layers
from curvlab.losses import CrossEntropy

D_OUT, D_IN = 24, 40
SEEDS = (0, 1, 2)


def part_of(layer: str = "w", **tensors: Tensor) -> Part:
    items: dict[Any, Item] = {role: Item(role, t, f"file: {role}", "named") for role, t in tensors.items()}  # type: ignore[arg-type]
    return Part(layer, items)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Setting:
    """Factors with falling spectra, their bases and the mask at γ, written out; a gradient; base weights."""

    def __init__(self, seed: int, gamma: float = 0.9) -> None:
        self.gamma = gamma
        self.u_out, self.u_in = (torch.linalg.qr(randn(d, d, seed=seed + d))[0] for d in (D_OUT, D_IN))
        l_out, l_in = torch.exp(-0.15 * torch.arange(D_OUT)).double(), torch.exp(-0.1 * torch.arange(D_IN)).double()
        self.A, self.S = self.u_in * l_in @ self.u_in.T, self.u_out * l_out @ self.u_out.T
        products = torch.outer(l_out, l_in)
        ordered = products.flatten().sort(descending=True).values
        rank = int((ordered.cumsum(0) < gamma * ordered.sum()).sum()) + 1
        self.mask = products < ordered[rank - 1]
        # steep directions carry most of a gradient
        self.gradient = self.u_out @ (randn(D_OUT, D_IN, seed=seed) * products.sqrt()) @ self.u_in.T
        self.base = randn(D_OUT, D_IN, seed=seed + 1)

    def project(self, Q: Tensor) -> Tensor:
        return self.u_out @ (self.mask * (self.u_out.T @ Q @ self.u_in)) @ self.u_in.T

    def part(self, dtype: torch.dtype = torch.float32, **tensors: Tensor) -> Part:
        own = {"U_out": self.u_out, "U_in": self.u_in}
        return part_of(**{k: t.to(dtype) for k, t in (own | tensors).items()}, mask=self.mask)


def one(findings: list[Finding], name: str) -> Finding:
    (found,) = [f for f in findings if f.check == name]
    return found


def adam(gradients: list[Tensor], project: Any, project_update: Any, base: Tensor, lr: float = 1e-2) -> Tensor:
    """Adam by its formulas."""
    m, v, W = torch.zeros_like(base), torch.zeros_like(base), base.clone()
    for t, g in enumerate(gradients, 1):
        g = project(g)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
        W = W - project_update(lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-12))
    return W


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_projected_edit_is_inside(dtype: torch.dtype, seed: int) -> None:
    """Weights in the dtype at every step; the bound is that of their rounding, which a difference does not lose."""
    s = Setting(seed)
    W = s.base.to(dtype)
    for k in range(10):
        g = s.project(s.gradient + 0.3 * randn(D_OUT, D_IN, seed=k))
        W = (W.double() - 0.05 * g).to(dtype)
    part = part_of(base=s.base.to(dtype), edited=W, mask=s.mask, U_out=s.u_out.float(), U_in=s.u_in.float())
    found = one(check(part, None, None), "update-subspace")
    assert found.severity == "ok", found
    assert found.measured <= found.bound  # type: ignore[operator]
    assert (found.measured > 1e-3) == (dtype == torch.bfloat16)  # type: ignore[operator]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
def test_optimisers_are_told_apart(gamma: float, seed: int) -> None:
    s = Setting(seed, gamma)
    gradients = [s.gradient + 0.3 * randn(D_OUT, D_IN, seed=k) * s.gradient.std() for k in range(8)]
    nothing = lambda Q: Q  # noqa: E731
    cases = {
        "leak": (adam(gradients, s.project, nothing, s.base), "convention", "update-adam-leak"),
        "projected update": (adam(gradients, nothing, s.project, s.base), "ok", None),
        "unprojected": (adam(gradients, nothing, nothing, s.base), "error", "update-outside-subspace"),
        "unprojected SGD": (s.base - 0.1 * sum(gradients), "error", "update-outside-subspace"),
    }
    for name, (edited, severity, fault) in cases.items():
        found = one(check(s.part(base=s.base, edited=edited), None, None), "update-subspace")
        assert (found.severity, found.fault) == (severity, fault), (name, found)


@pytest.mark.parametrize("seed", SEEDS)
def test_gradient_and_update_pairs(seed: int) -> None:
    s = Setting(seed)
    Pg = s.project(s.gradient)
    cases = {
        "projected gradient": (-0.1 * Pg, "ok", None, "as SGD steps"),
        "projected update": (s.project(-s.gradient.sign()), "ok", None, "projected after the optimiser"),
        "Adam": (-1e-3 * Pg / (Pg.abs() + 1e-8 * Pg.std()), "convention", "update-adam-leak", "rescaled"),
        "gradient": (-0.1 * s.gradient, "error", "update-outside-subspace", "never projected"),
        "unprojected Adam": (-1e-3 * s.gradient.sign(), "error", "update-outside-subspace", "without a projection"),
    }
    for name, (update, severity, fault, words) in cases.items():
        found = one(check(s.part(gradient=s.gradient, update=update), None, None), "update-subspace")
        assert (found.severity, found.fault) == (severity, fault), (name, found)
        assert words in found.cause, (name, found)


@pytest.mark.parametrize("seed", SEEDS)
def test_projectors_and_factors_constrain_alike(seed: int) -> None:
    s = Setting(seed)
    keep = s.u_in[:, 10:]
    P = keep @ keep.T
    inside, outside = s.gradient @ P, s.gradient
    for update, severity in ((inside, "ok"), (outside, "error")):
        found = one(check(part_of(projector=P.float(), update=update.float()), None, None), "update-subspace")
        assert found.severity == severity
        share = float((update - update @ P).norm() / update.norm())
        assert found.measured == pytest.approx(share, abs=1e-6)
    factors = {"A": s.A.float(), "S": s.S.float()}
    for update, severity in ((s.project(s.gradient), "ok"), (outside, "error")):
        found = one(check(part_of(**factors, update=update), 0.9, None), "update-subspace")
        assert found.severity == severity
        share = float((update - s.project(update)).norm() / update.norm())
        assert found.measured == pytest.approx(share, abs=2e-3)  # what lies at the threshold may go or stay
    assert not [f for f in check(part_of(**factors, update=outside), None, None) if f.check == "update-subspace"]


def test_a_transposed_mask_does_not_hold_the_edit() -> None:
    s = Setting(0)
    part = s.part(update=s.project(s.gradient))
    flipped = Part("w", part.items | {"mask": Item("mask", s.mask.flip(0, 1), "file: mask", "")})
    assert one(check(part, None, None), "update-subspace").severity == "ok"
    assert one(check(flipped, None, None), "update-subspace").severity in ("error", "deviation")


def test_silent_edits_drift_and_damage() -> None:
    s = Setting(0)
    nothing = one(check(s.part(base=s.base, edited=s.base), None, None), "update")
    assert (nothing.severity, nothing.fault) == ("error", "no-change")
    assert one(check(part_of(base=s.base, edited=s.base), None, None), "update").severity == "ok"
    far = s.project(s.gradient)
    for size, severity in ((0.2, "ok"), (0.3, "deviation")):
        edited = s.base + far * (size * s.base.norm() / far.norm())
        found = one(check(s.part(base=s.base, edited=edited), None, None), "update-drift")
        assert found.severity == severity
        assert found.measured == pytest.approx(size, rel=1e-5)
    broken = one(check(s.part(base=s.base, edited=s.base * torch.inf), None, None), "update")
    assert broken.fault == "not-finite"
    misfit = one(check(s.part(base=s.base, edited=s.base[:, 1:]), None, None), "update")
    assert misfit.fault == "mismatched-shapes"
    assert check(part_of(A=s.A), None, None) == []


def test_a_change_below_the_weights_rounding_says_nothing() -> None:
    s = Setting(0)
    base = s.base.bfloat16()
    edited = (base.double() + 1e-4 * randn(D_OUT, D_IN, seed=5)).bfloat16()
    found = one(
        check(part_of(base=base, edited=edited, mask=s.mask, U_out=s.u_out, U_in=s.u_in), None, None), "update-subspace"
    )
    assert found.severity == "convention"
    assert "rounding" in found.cause


def test_layers_changed_without_a_constraint() -> None:
    s = Setting(0)
    edited = s.part(base=s.base, edited=s.base + s.project(s.gradient))
    still, moved = part_of("still", base=s.base, edited=s.base), part_of("moved", base=s.base, edited=s.base + 0.1)
    (found,) = others([edited, still, moved])
    assert found.severity == "error"
    assert "moved" in found.cause
    (found,) = others([still, moved])  # no constraint anywhere: nothing to hold them to, and what changed is said
    assert (found.check, found.severity, found.subject) == ("update-changes", "convention", "moved")
    assert others([still]) == []


def test_curvature_spent() -> None:
    s = Setting(1)
    delta = 0.01 * s.project(s.gradient)
    dense = torch.kron(s.A, s.S)  # of the column-stacked vec
    v = delta.T.flatten()
    exact = 0.5 * float(v @ dense @ v)
    isotropic = 0.5 * float(delta.square().sum() * s.A.trace() * s.S.trace()) / delta.numel()
    found = one(check(s.part(torch.float64, A=s.A, S=s.S, update=delta), None, None), "update-curvature")
    assert found.severity == "ok"
    assert found.measured == pytest.approx(exact / isotropic, rel=1e-10)
    values = torch.outer((s.u_out.T @ s.S @ s.u_out).diagonal(), (s.u_in.T @ s.A @ s.u_in).diagonal())
    found = one(check(s.part(torch.float64, eigenvalues=values, update=delta), None, None), "update-curvature")
    assert found.measured == pytest.approx(exact / isotropic, rel=1e-8)
    steep = s.part(torch.float64, A=s.A, S=s.S, update=s.u_out[:, :1] @ s.u_in[:, :1].T)
    assert one(check(steep, None, None), "update-curvature").measured > 1  # the sharpest direction of all


@pytest.mark.parametrize("name", ["llama", "gpt2", "lenet"])
def test_capability_change_is_the_kl(name: str) -> None:
    """Against softmax by hand; the model is left as it was; predicted and measured agree for a small edit."""
    model, layer, data = {
        "llama": lambda: (llama(0), "model.layers.1.mlp.down_proj", texts(0)),
        "gpt2": lambda: (gpt2(0), "transformer.h.1.mlp.c_proj", texts(0)),
        "lenet": lambda: (lenet(0), "6", images(0)),
    }[name]()
    (own,) = find_layers(model, [layer])
    base = own.matrix().double()
    delta = 0.02 * base.norm() * F.normalize(randn(*base.shape, seed=3), dim=(0, 1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    subject = Subject(model, CrossEntropy(), data)
    distance, change, terms = capability_change(subject, own, base, base + delta)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    expected, loss, count = by_hand(model, own, delta, data)
    assert terms == count
    assert distance == pytest.approx(expected, rel=1e-3)
    assert change == pytest.approx(loss, rel=1e-3, abs=1e-6)
    far, _, _ = capability_change(subject, own, base, base + 25 * delta)  # where KL(p ‖ p_0) is another number
    assert far == pytest.approx(by_hand(model, own, 25 * delta, data)[0], rel=1e-3)
    made = produce(model, layer, data, Run(labels="model"))
    part = part_of(layer, A=made.A, S=made.S, base=base, edited=base + delta)
    found = one(check(part, None, subject), "update-capability")
    assert found.severity == "ok", found
    predicted = 0.5 * float((made.S @ delta @ made.A * delta).sum())
    assert found.measured == pytest.approx(predicted / expected, rel=1e-2)
    sums = part_of(layer, A=made.A * 500, S=made.S * 500, base=base, edited=base + delta)
    assert one(check(sums, None, subject), "update-capability").severity == "deviation"


def by_hand(model: nn.Module, layer: Any, delta: Tensor, data: list[Any]) -> tuple[float, float, int]:
    kl = loss = 0.0
    count = 0
    W = layer.matrix().clone()
    for batch in data:
        logits = []
        for own in (W, (W.double() + delta).to(W)):
            layer.write(own)
            with torch.no_grad():
                y = model(**batch.inputs).logits if isinstance(batch.inputs, dict) else model(batch.inputs)[:, None]
            logits.append(y.double().log_softmax(-1))
        targets = batch.targets if batch.targets.dim() == 2 else batch.targets[:, None]
        for n, t in (targets != -100).nonzero().tolist():
            p, q = logits[0][n, t], logits[1][n, t]
            kl += float((p.exp() * (p - q)).sum())
            loss += float(p[targets[n, t]] - q[targets[n, t]])
            count += 1
    layer.write(W)
    return kl / count, loss / count, count


def test_a_model_at_the_edited_weights_is_noticed() -> None:
    model, data = llama(0), texts(0)
    layer = "model.layers.1.mlp.down_proj"
    edited = model.get_submodule(layer).weight.detach().clone()
    base = edited - 0.01 * randn(*edited.shape, seed=1).float()
    findings = check(part_of(layer, base=base, edited=edited), None, Subject(model, CrossEntropy(), data))
    assert "has the edited weights" in one(findings, "update-model").cause
    assert one(findings, "update-capability").measured > 0  # type: ignore[operator]


@pytest.mark.parametrize("rate", [1e-3, 0.05])
def test_weight_decay_is_told_from_a_leak(rate: float) -> None:
    s = Setting(0)
    edited = (1 - rate) * s.base - 0.05 * s.project(s.gradient)
    found = one(check(s.part(base=s.base, edited=edited), None, None), "update-subspace")
    assert (found.severity, found.fault) == ("deviation", "update-weight-decay")
    assert f"{rate:.2%} of the base weights" in found.cause
    grown = one(check(s.part(base=s.base, edited=2 * s.base - edited), None, None), "update-subspace")
    assert grown.fault != "update-weight-decay"  # no decay makes weights larger


def test_in_one_removed_direction_a_step_outside_is_no_weight_decay() -> None:
    """There it is proportional to the weights' own part, whatever led to it."""
    s = Setting(0)
    s.mask = torch.ones_like(s.mask)
    s.mask[0, 0] = False
    for sign in (1.0, -1.0):
        found = one(check(s.part(base=s.base, edited=s.base + sign * 0.05 * s.gradient), None, None), "update-subspace")
        assert found.fault in ("update-adam-leak", "update-outside-subspace")


def test_a_checkpoint_stored_after_the_edit_alone_is_held_against_the_model() -> None:
    model = llama(0)
    weights = {k: v.clone() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    names = ("model.layers.0.mlp.down_proj.weight", "model.norm.weight")
    after = {**weights, **{name: weights[name] + 0.1 for name in names}}
    files = with_model([Stored(Path("out/model.safetensors"), "safetensors", after)], model)
    parts = identify(files, {own.name: own for own in supported_layers(model)})
    changed = {
        p.layer
        for p in parts
        if {"base", "edited"} <= {*p.items} and not p.items["base"].tensor.equal(p.items["edited"].tensor)
    }
    assert changed == {name.removesuffix(".weight") for name in names}
    (found,) = others(parts)
    assert (found.check, found.severity) == ("update-changes", "convention")
    assert with_model([Stored(Path("a.pt"), "torch zip", {"A": torch.eye(3)})], model)[1:] == []
