"""Which layer of the model a factor belongs to: by its name, else by what fits."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.gathering import gather
from curvlab.crosscheck.parts import Part, Role
from curvlab.crosscheck.structures import Side, fits
from curvlab.crosscheck.subject import Subject
from curvlab.layers import MatrixLayer, find_layers


def layers_of_shape(model: nn.Module, stored: Mapping[Side, Tensor], names: Sequence[str] | None = None) -> list[str]:
    """Layers (of `names`) that the stored factors may belong to by their shape, in the model's order."""
    out = []
    for name, module in model.named_modules():
        if name and hasattr(module, "weight") and (names is None or name in names):
            try:
                (layer,) = find_layers(model, [name])
            except ValueError:  # another kind of module, or a tied weight
                continue
            if _fits(layer, stored):
                out.append(name)
    return out


def _fits(layer: MatrixLayer, stored: Mapping[Side, Tensor]) -> bool:
    d_in, d_out = (layer.d_in, layer.d_in + 1), layer.d_out
    A, S, values = stored.get("A"), stored.get("S"), stored.get("eigenvalues")
    return (
        (A is None or A.shape[0] in d_in)
        and (S is None or S.shape[0] == d_out)
        and (values is None or (values.shape[0] == d_out and values.shape[1] in d_in))
    )


def locate(
    part: Part, subject: Subject, stored: Mapping[Side, Tensor], all_layers: Sequence[str] | None, seed: int
) -> tuple[str | None, list[Finding]]:
    """The layer of the model that a part belongs to, by its name, else by what fits; None where there is none."""
    modules = dict(subject.model.named_modules())
    names = [n for n in (part.layer, part.layer.removesuffix(".weight")) if n in modules and n]
    sides: list[Role] = [side for side in ("A", "S", "eigenvalues") if side in stored]
    where = part.subject(*sides)
    if names:
        (layer,) = find_layers(subject.model, [names[0]])
        if _fits(layer, stored):
            return layer.name, []
        shapes = ", ".join(f"{side} {' × '.join(map(str, X.shape))}" for side, X in stored.items())
        A, S = stored.get("A"), stored.get("S")
        if (
            (A is None or len(A) == layer.d_out)
            and (S is None or len(S) == layer.d_in)
            and (A is not None or S is not None)
        ):
            return None, [swapped(where, f"{shapes}, but {layer.name} is {layer.d_out} × {layer.d_in}", None)]
        return None, [
            Finding(
                "layer", "error", where, shapes, f"A {layer.d_in}, S {layer.d_out}",
                f"the factors do not fit {layer.name}, which is {layer.d_out} × {layer.d_in}",
                "name the layer that they were computed for", "mismatched-shapes",
            )
        ]  # fmt: skip
    candidates = layers_of_shape(subject.model, stored, all_layers)
    if not candidates:
        return None, [
            Finding(
                "layer", "error", where, part.layer or "no name", None,
                f"no layer of the model is called {part.layer!r}, or has its shape",
                "name the layer: one of the model's own names", "mismatched-shapes",
            )
        ]  # fmt: skip
    if len(candidates) == 1:
        best, said = candidates[0], "the only layer of its shape"
    else:
        ranked = sorted(search(subject, stored, candidates, seed).items(), key=lambda pair: sum(pair[1].values()))
        best = ranked[0][0] if ranked else candidates[0]
        said = f"the nearest of {len(candidates)} of its shape"
    cause = f"no layer is called {part.layer!r}; " if part.layer else "nothing names its layer; "
    return best, [
        Finding("layer", "convention", where, best, None, f"{cause}taken for {best}, {said}", "name the layer")
    ]


def search(
    subject: Subject, stored: Mapping[Side, Tensor], names: Sequence[str], seed: int
) -> dict[str, dict[Side, float]]:
    """The best residual of each factor against each layer, all layers in one pass."""
    stored = {side: X for side, X in stored.items() if side != "eigenvalues"}
    try:
        found = gather(subject.model, subject.loss, subject.data, list(names), seed=seed, thorough=False)
    except ValueError:  # one that the forward pass never uses, say: those that can be tried, one by one
        found = {}
        for name in names:
            try:
                found |= gather(subject.model, subject.loss, subject.data, name, seed=seed, thorough=False)
            except ValueError:
                continue
    out: dict[str, dict[Side, float]] = {}
    for name, moments in found.items():
        out[name] = {}
        for side, X in stored.items():
            best = fits(X.double(), side, moments)
            out[name][side] = best[0].residual if best else 1.0
    return out


def swapped(where: str, evidence: str, measured: float | None) -> Finding:
    return Finding(
        "convention", "error", where, measured, None, f"A and S are swapped: {evidence}",
        "A is the input side (d_in × d_in), S (the authors' B) the output side; exchange them", "swapped-factors",
    )  # fmt: skip


@contextmanager
def weights_of(layer: MatrixLayer, W: Tensor) -> Iterator[None]:
    """The model with another weight in one layer (without its bias), put back at the end."""
    before = [p.detach().clone() for p in layer.parameters()]
    try:
        layer.write(W.to(before[0]))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(layer.parameters(), before, strict=True):
                parameter.copy_(value)
