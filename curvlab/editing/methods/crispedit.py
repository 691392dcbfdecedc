"""CrispEdit (paper, Algorithm 1): descent on the edit loss within the low-curvature subspace of the capability loss."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from curvlab.descent import DriftRule, attach
from curvlab.editing.capability import CurvatureName
from curvlab.editing.job import Job, editor
from curvlab.editing.training import Training
from curvlab.eigenbasis import parametrize
from curvlab.projector import Ellipsoid, NullSpace
from curvlab.spectrum import Spectrum


@dataclass(frozen=True)
class Constrained(Training):
    """Training under a constraint.

    Attributes:
        curvature: of the capability loss: "kfac", "ekfac" or "covariance".
        constraint: "null" (the γ-approximate null space, the paper's) or "ellipsoid" (½ δᵀCδ ≤ ε).
        gamma: share of the curvature's energy that is removed, of each layer.
        epsilon: budget in nats a capability token.
        project: "gradient" (the paper's), "update", or "eigenbasis"; None takes "gradient" for a null space and
            "update" for an ellipsoid.
        drift: the curvature is fitted again once a layer has moved by more than this share of its norm since the
            last fit (checked once an epoch, but after the last); None never.
        cache_rotated: in the eigenbasis, the rotated inputs of the lowest edited layer are computed once.
    """

    curvature: CurvatureName = "kfac"
    constraint: Literal["null", "ellipsoid"] = "null"
    gamma: float = 0.9
    epsilon: float = 1e-3
    project: Literal["gradient", "update", "eigenbasis"] | None = None
    drift: float | None = 0.25
    cache_rotated: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.curvature not in ("kfac", "ekfac", "covariance"):
            raise ValueError(f"curvature must be 'kfac', 'ekfac' or 'covariance', got {self.curvature!r}")
        if self.constraint not in ("null", "ellipsoid"):
            raise ValueError(f"constraint must be 'null' or 'ellipsoid', got {self.constraint!r}")
        if self.project not in (None, "gradient", "update", "eigenbasis"):
            raise ValueError(f"project must be 'gradient', 'update' or 'eigenbasis', got {self.project!r}")
        if not 0 < self.gamma < 1:
            raise ValueError(f"gamma must lie strictly between 0 and 1, got {self.gamma}")
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"epsilon must be positive and finite, got {self.epsilon}")
        if self.drift is not None and not self.drift > 0:
            raise ValueError(f"drift must be positive, or None, got {self.drift}")
        if self.constraint == "ellipsoid" and self.project == "gradient":
            raise ValueError("an ellipsoid bounds the displacement: use project='update' or 'eigenbasis'")
        if self.constraint == "ellipsoid" and self.curvature == "covariance":
            raise ValueError(
                "the activation covariance has no units of loss for epsilon to be in: use 'kfac' or 'ekfac'"
            )
        probe = self.optimise([nn.Parameter(torch.zeros(1))])
        if self.way == "gradient" and any(group.get("weight_decay", 0) for group in probe.param_groups):
            raise ValueError("weight decay leaves the null space after the gradient's projection: use project='update'")
        if self.way == "update" and isinstance(probe, torch.optim.LBFGS):
            raise ValueError("LBFGS relies on its step having been taken in full: use project='gradient'")

    @property
    def way(self) -> Literal["gradient", "update", "eigenbasis"]:
        """What is projected."""
        return self.project or ("gradient" if self.constraint == "null" else "update")

    def of(self, spectrum: Spectrum) -> NullSpace | Ellipsoid:
        """The constraint on a spectrum."""
        return spectrum.null_space(self.gamma) if self.constraint == "null" else spectrum.ellipsoid(self.epsilon)


@editor("crispedit", Constrained)
@editor("crispedit-ekfac", Constrained, curvature="ekfac")
@editor("crispedit-covariance", Constrained, curvature="covariance")
@editor("crispedit-eps", Constrained, constraint="ellipsoid")
def crispedit(job: Job, options: Constrained) -> None:
    """Algorithm 1: K-FAC (EK-FAC, covariance) of the capability set, then constrained descent on all requests."""
    capability = job.needs_capability()
    spectrum = job.timed(capability.spectrum, job.model, job.tokenizer, job.layers, options.curvature)

    def refit() -> NullSpace | Ellipsoid:
        return options.of(capability.fit(job.model, job.tokenizer, job.layers, options.curvature).spectrum())

    constrained_training(job, options, options.of(spectrum), refit)


def constrained_training(
    job: Job,
    options: Constrained,
    constraint: NullSpace | Ellipsoid,
    refit: Callable[[], NullSpace | Ellipsoid] | None = None,
    **how: Any,
) -> None:
    """Train under `constraint` in the way that `options.way` names; `how` goes to `Job.train`.

    Counts: refits; leak, the largest share of a displacement (between fits) outside the constraint; for an
    ellipsoid what was spent of ε, for a null space the dimensions kept, of the last constraint.
    """
    parameters = job.parameters()
    leaks = [job.counts.get("leak", 0.0)]

    def measured() -> NullSpace | Ellipsoid:
        leaks.append(moving.leak())  # a refit begins a new displacement
        assert refit is not None
        return refit()

    drift = DriftRule(measured, options.drift) if refit is not None and options.drift is not None else None
    moving: Any
    if options.way == "eigenbasis":
        moving = parametrize(job.model, constraint)
        try:
            optimizer = options.optimise(moving.parameters())
            moving.attach(optimizer, drift)
            cached = moving if options.cache_rotated else None
            job.train(optimizer, options, after_epoch=moving.check_drift, eigen=cached, **how)
        finally:
            moving.merge()
    else:
        optimizer = options.optimise(parameters)
        with warnings.catch_warnings():  # that Adam leaves the null space is the paper's way; `leak` is recorded
            warnings.filterwarnings("ignore", message=".*leaves the null space")
            moving = attach(job.model, optimizer, constraint, project=options.way, drift=drift)
        try:
            job.train(optimizer, options, after_epoch=moving.check_drift, **how)
        finally:
            moving.detach()
    job.counts["refits"] = job.counts.get("refits", 0) + moving.refits
    job.counts["leak"] = max(*leaks, moving.leak())
    if isinstance(moving.constraint, NullSpace):
        job.counts["kept_dimensions"] = moving.constraint.kept
    else:
        spent = float(moving.constraint.spent(moving.displacement()))
        job.counts["spent"] = max(job.counts.get("spent", 0.0), spent)
