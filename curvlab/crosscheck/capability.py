"""The capability change of an edit, measured on data, against the one that the curvature predicts."""

import math

import torch
from torch import Tensor

from curvlab.capture import as_batch, run, shaped, split, to_device
from curvlab.crosscheck.changes import Change
from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.locate import weights_of
from curvlab.crosscheck.parts import Part
from curvlab.crosscheck.subject import Subject
from curvlab.layers import MatrixLayer, device_of
from curvlab.losses import as_loss

ORDER = 10.0  # predicted and measured capability change agree to within this factor where the prediction is of use


def measured(
    part: Part, change: Change, layer: MatrixLayer, subject: Subject, predicted: float | None
) -> list[Finding]:
    """KL(p_θ0 ‖ p_θ) (the loss' Bregman distance) and loss change on the data, of this layer's edit alone."""
    where = part.subject(*change.roles)
    base = layer.matrix().double().cpu() if change.base is None else change.base
    if base.shape != change.delta.shape:
        return []
    out = []
    own = layer.matrix().double().cpu()
    gap = float((own - base).norm() / base.norm()) if float(base.norm()) > 0 else 0.0
    if gap > torch.finfo(layer.parameters()[0].dtype).eps:
        moved = float((own - base - change.delta).norm()) <= float((own - base).norm()) * 1e-3
        out.append(
            Finding(
                "update-model", "deviation", where, gap, torch.finfo(layer.parameters()[0].dtype).eps,
                f"the model's {layer.name} {'has the edited weights' if moved else 'is not at the base weights'}: "
                "the base weights are put in for the measurement", "give the model as it was before the edit",
            )
        )  # fmt: skip
    distance, loss_change, terms = capability_change(subject, layer, base, base + change.delta)
    said = f"KL(p_θ0 ‖ p_θ) = {distance:.3g} and a loss change of {loss_change:+.3g} a loss term over {terms} terms"
    if predicted is None or predicted <= 0:
        return [*out, Finding("update-capability", "ok", where, distance, None, f"measured {said}")]
    ratio = predicted / distance if distance > 0 else math.inf
    cause = f"predicted ½ δᵀCδ = {predicted:.3g}, measured {said}: predicted / measured = {ratio:.3g}"
    if 1 / ORDER <= ratio <= ORDER:
        return [*out, Finding("update-capability", "ok", where, ratio, f"1/{ORDER:g} to {ORDER:g}", cause)]
    likely = (
        "factors that are plain sums, or of the data's labels far from the model's" if ratio > 1
        else "an edit beyond the quadratic model's reach, factors of mean-reduced gradients, or of other weights"
    )  # fmt: skip
    return [
        *out,
        Finding(
            "update-capability",
            "deviation",
            where,
            ratio,
            f"1/{ORDER:g} to {ORDER:g}",
            f"{cause}; likely: {likely}",
            "trust the measured change; choose ε by it, not by the prediction",
        ),
    ]


@torch.no_grad()
def capability_change(subject: Subject, layer: MatrixLayer, base: Tensor, edited: Tensor) -> tuple[float, float, int]:
    """(Bregman distance, loss change, terms) of the layer's change, means over the data's loss terms in float64."""
    loss = as_loss(subject.loss)
    model, device = subject.model, device_of(subject.model)
    totals, terms = torch.zeros(2, dtype=torch.float64), 0
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for batch in split([as_batch(item) for item in subject.data], None, model):
            outputs = []
            for W in (base, edited):
                with weights_of(layer, W):
                    raw = run(model, to_device(batch.inputs, device))
                y, targets = shaped(raw, batch.targets.to(raw.device))
                outputs.append(y.double())
            before, after = outputs
            real = loss.terms(before, targets)
            terms += int(real.sum())
            targets = targets.double() if targets.is_floating_point() else targets
            totals[0] += float(loss.bregman(after, before, targets)[real].sum())
            totals[1] += float((loss.value(after, targets) - loss.value(before, targets))[real].sum())
    finally:
        for module in training:
            module.training = True
    distance, change = (totals / max(terms, 1)).tolist()
    return distance, change, terms
