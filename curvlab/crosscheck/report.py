"""`crosscheck`: read what a production run left behind, understand it, check it, and say what was found."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from curvlab.capture import Data
from curvlab.crosscheck import bases, conventions, factors, masks, precision, projectors, updates
from curvlab.crosscheck.conventions import Subject
from curvlab.crosscheck.extremes import sound
from curvlab.crosscheck.findings import SEVERITIES, Finding, Severity, by_severity
from curvlab.crosscheck.formats.refusal import printable
from curvlab.crosscheck.gathering import gather
from curvlab.crosscheck.identify import identify
from curvlab.crosscheck.moments import LayerMoments
from curvlab.crosscheck.pairs import with_model
from curvlab.crosscheck.parts import Item, Part, Role, Stored
from curvlab.crosscheck.readers import survey
from curvlab.crosscheck.unaccompanied import accompanied, alone
from curvlab.layers import MatrixLayer, find_layers, supported_layers
from curvlab.losses import CrossEntropy, as_loss
from curvlab.memory import available, bytes_of
from curvlab.progress import progress

SUMS = 32  # matrices that every convention of a side takes, about


@dataclass(frozen=True)
class Report:
    """What a cross-check found.

    Attributes:
        findings: the worst first.
        parts: what the files were understood to hold, one a layer.
        unreadable: files that could not be read, a line each.
    """

    findings: tuple[Finding, ...]
    parts: tuple[Part, ...]
    unreadable: tuple[str, ...] = ()

    @property
    def status(self) -> int:
        """Exit status: 2 where a file could not be read, 1 where there are errors, else 0."""
        return 2 if self.unreadable else int(self.count("error") > 0)

    def count(self, severity: Severity) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def faults(self) -> list[str]:
        """Names of the fault classes found, in the order of the findings."""
        return list(dict.fromkeys(finding.fault for finding in self.findings if finding.fault))

    def verdict(self) -> str:
        """One line."""
        counts = ", ".join(f"{self.count(severity)} {severity}" for severity in SEVERITIES)
        unread = f", {len(self.unreadable)} unreadable" if self.unreadable else ""
        layers = sum(bool(part.items) for part in self.parts)
        return f"{layers} layer{'s' * (layers != 1)}: {counts}{unread}"


def crosscheck(
    paths: str | Path | Sequence[str | Path],
    *,
    model: nn.Module | None = None,
    loss: Any = None,
    data: Data | None = None,
    layer: str | None = None,
    gamma: float | None = None,
    seed: int = 0,
) -> Report:
    """Check factors, eigenvectors, masks, projectors and updates in files; nothing in them is executed.

    Args:
        paths: files and folders; which tensor is what is decided by evidence.
        model: whose layers these are; without it sides are told by shapes and names alone.
        loss: of the model; cross-entropy by default.
        data: batches (as for `KFAC.fit`) that the production run saw, or as like them as can be had. With a model,
            factors are recomputed in every convention and compared.
        layer: look at this layer only; names the tensors where the files do not.
        gamma: the energy share that the masks should have.
        seed: of labels drawn from the model.

    Raises:
        ValueError: arguments that cannot be meant: no paths, γ outside (0, 1), data without a model, an unknown layer.
    """
    files = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    if not files:
        raise ValueError("no paths were given; name at least one file or folder")
    if gamma is not None and not 0 < gamma < 1:
        raise ValueError(f"gamma must lie strictly between 0 and 1, got {gamma}")
    if data is not None and model is None:
        raise ValueError("data were given without the model that should run on them")
    layers = {} if model is None else {own.name: own for own in supported_layers(model)}
    if model is not None and layer is not None:
        find_layers(model, layer)  # refuses a name that the model does not have
    stored: list[Stored] = []
    unreadable: list[str] = []
    for file in files:
        found, refused = survey(file)
        stored += found
        unreadable += map(str, refused)
    stored = stored if model is None else with_model(stored, model)
    parts = identify(stored, layers or None)
    parts = [_completed(part, layers) for part in _chosen(parts, layer)]
    subject = None
    if model is not None and data is not None:
        subject = Subject(model, CrossEntropy() if loss is None else as_loss(loss), list(data))
    moments = {} if subject is None else _moments(parts, subject, layers, seed)
    findings: list[Finding] = []
    for part in progress(parts, "cross-check"):
        findings += _check(part, gamma, subject, list(layers), seed, moments)
    findings += updates.others(parts)
    if not _checked(findings) and not unreadable:
        wanted = f" of layer {layer!r}" if layer else ""
        names = printable(", ".join(map(str, files)))
        cause = f"nothing{wanted} was found in {names} that could be checked"
        findings.append(Finding("content", "error", names, 0, 1, cause, "name other files"))
    return Report(tuple(by_severity(findings)), tuple(parts), tuple(dict.fromkeys(unreadable)))


def _checked(findings: Sequence[Finding]) -> bool:
    """Whether anything was held to a bound: notes, and the dtype that numbers are stored in, are no checks."""
    return any(own.severity != "convention" and not own.check.startswith("precision") for own in findings)


def _chosen(parts: list[Part], layer: str | None) -> list[Part]:
    if layer is None:
        return parts
    nameless = [part for part in parts if not part.layer]
    if len(nameless) == len(parts):
        return [replace(part, layer=layer) for part in parts]
    return [part for part in parts if part.layer == layer]


def _completed(part: Part, layers: dict[str, MatrixLayer]) -> Part:
    """With the model's own weight as what was edited: one stored weight that differs from it is the edited one."""
    known = layers.get(part.layer)
    alone = [role for role in ("base", "edited") if role in part.items]
    if known is None or len(alone) != 1:
        return part
    weight = known.matrix()
    found = part.items[alone[0]]
    if found.oriented.shape != weight.shape:
        return part
    items: dict[Role, Item] = {role: item for role, item in part.items.items() if role not in ("base", "edited")}
    items["base"] = Item("base", weight, "the model", "the model's own weight")
    items["edited"] = replace(found, role="edited", evidence=f"{found.evidence}; held against the model's weight")
    return replace(part, items=items)


def _moments(
    parts: Sequence[Part], subject: Subject, layers: Mapping[str, MatrixLayer], seed: int
) -> dict[str, LayerMoments]:
    """Of all layers from one pass, where they fit into memory together; else each takes a pass of its own.

    EK-FAC's eigenvalues want sums in their own basis, and with it their own pass.
    """
    known = [part for part in parts if part.layer in layers and "eigenvalues" not in part.items]
    names = list(dict.fromkeys(part.layer for part in known if {"A", "S"} & {*part.items} or alone(part)))
    sizes = [bytes_of(d, d, dtype=torch.float64) for n in names for d in (layers[n].d_in, layers[n].d_out)]
    together = len(names) > 1 and SUMS * sum(sizes) <= available() / 2
    wanted = names if together else [part.layer for part in known if alone(part)]
    return gather(subject.model, subject.loss, subject.data, wanted, seed=seed) if wanted else {}


def _check(
    part: Part, gamma: float | None, subject: Subject | None, layers: Sequence[str], seed: int,
    moments: Mapping[str, LayerMoments],
) -> Iterator[Finding]:  # fmt: skip
    yield from part.assumed
    before = sound(part)
    for role in (role for role in part.items if role not in before.items):
        yield _unsound(part, role)
    part = before
    if subject is not None and part.layer in moments and alone(part):
        part, found = accompanied(part, moments[part.layer])
        yield from found
    for check in (factors.check, bases.check, masks.check, projectors.check, precision.check):
        yield from check(part, gamma)
    if subject is not None and part.layer and not alone(before):
        yield from conventions.check(part, subject, all_layers=layers, seed=seed, moments=moments)
    yield from updates.check(part, gamma, subject)


def _unsound(part: Part, role: Role) -> Finding:
    tensor = part.items[role].tensor
    if tensor.numel() == 0:
        cause = f"{role} has shape {tuple(tensor.shape)}: it holds no number"
        remedy = "write it again: the run that made it had no data or wrote too early"
        return Finding("content", "error", part.subject(role), 0, 1, cause, remedy, "empty-tensor")
    if tensor.is_complex() or bool(torch.isfinite(tensor).all()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        cause = f"{role} holds {'complex' if tensor.is_complex() else 'whole'} numbers ({dtype}): nothing was checked"
        remedy = "store float32 or float64: take the real part, or undo the quantisation with its scale"
        return Finding("content", "error", part.subject(role), dtype, "real numbers", cause, remedy, "wrong-dtype")
    bad = int((~torch.isfinite(tensor)).sum())
    cause = f"{bad:,} of {tensor.numel():,} numbers of {role} are not finite"
    remedy = "find the batch whose loss overflowed (half precision, log of zero), and take the statistics again"
    return Finding("content", "error", part.subject(role), bad, 0, cause, remedy, "not-finite")
