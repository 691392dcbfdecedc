"""CrispEdit-Seq (paper, Algorithm 2): rounds of edits, each protecting the capability set and all earlier rounds."""

from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

from torch import Tensor

from curvlab.curvature import KFAC
from curvlab.data.text import IGNORE
from curvlab.editing.capability import fit_statistics
from curvlab.editing.job import Job, editor
from curvlab.editing.methods.crispedit import Constrained, constrained_training
from curvlab.editing.training import Sequential


@dataclass(frozen=True)
class ConstrainedSequential(Constrained, Sequential):
    """Constrained training in rounds.

    Attributes:
        weights: how statistics are merged: "tokens" (the authors': every token counts alike, so that a few
            capability documents drown under many edits) or "share" (`share` for the capability set, the rest for
            all rounds together, by tokens).
        share: the capability set's share, for weights="share".
        mask_factors: take the edits' factors from the target's loss alone (False, the paper's: from every next
            token of prompt and target).
        factor_positions: "all" real positions enter the edits' factors (DESIGN: later predictions attend to those
            without a loss of their own, too), or "loss", only those that carry a loss: with `mask_factors` the
            target's.
        drift: None only: a round keeps its projector (Algorithm 2).
        epsilon: of an ellipsoid, a round: its centre is where the round began.
    """

    weights: Literal["tokens", "share"] = "tokens"
    share: float = 0.5
    mask_factors: bool = False
    factor_positions: Literal["all", "loss"] = "all"
    gamma: float = 0.999
    drift: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drift is not None:
            raise ValueError(
                "Algorithm 2 keeps a round's projector: drift must be None; smaller chunks refit more often"
            )
        if self.weights not in ("tokens", "share"):
            raise ValueError(f"weights must be 'tokens' or 'share', got {self.weights!r}")
        if self.factor_positions not in ("all", "loss"):
            raise ValueError(f"factor_positions must be 'all' or 'loss', got {self.factor_positions!r}")
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie strictly between 0 and 1, got {self.share}")
        if self.curvature == "ekfac":
            raise ValueError("EK-FAC's eigenvalues live in one basis and do not merge over rounds; use 'kfac'")
        if self.curvature == "covariance" and self.weights == "share":
            raise ValueError("covariances are merged by tokens: use weights='tokens', or curvature='kfac'")


@editor("crispedit-seq", ConstrainedSequential)
@editor("crispedit-seq-eps", ConstrainedSequential, constraint="ellipsoid", weights="share")
def crispedit_seq(job: Job, options: ConstrainedSequential) -> None:
    """Algorithm 2: chunk by chunk, the factors of each round's edits merged into those of the capability set.

    Counts (K-FAC): edits_input_share and edits_gradient_share, what the edits of all rounds but the last contribute
    to tr(Σ a aᵀ) and to tr(Σ g gᵀ) of the capability set and them together, a mean over layers.
    """
    capability = job.needs_capability()
    base = job.timed(capability.statistics, job.model, job.tokenizer, job.layers, options.curvature)
    kind: Any = type(base)
    edited: Any = None  # statistics of all earlier rounds; their requests are not needed again
    rounds = list(options.rounds(job.requests, job.seed))
    for number, (requests, seed) in enumerate(rounds, start=1):
        if edited is None:
            merged = base
        elif options.weights == "tokens":
            merged = kind.merge(base, edited)
        else:
            merged = kind.merge(base, edited, weights=[options.share, 1 - options.share])
        constrained_training(job, options, options.of(merged.spectrum()), requests=requests, seed=seed)
        if number == len(rounds):
            break  # no round follows that would need the last one's factors
        how = {"mask_prompt": options.mask_factors, "batch_size": options.batch_size}
        batches = options.encode(job.tokenizer, requests, **how)
        if options.factor_positions == "loss":
            batches = [replace(batch, mask=batch.targets != IGNORE) for batch in batches]
        new = fit_statistics(job.model, batches, job.layers, options.curvature, labels=capability.labels, seed=seed)
        edited = new if edited is None else kind.merge(edited, new)
    if isinstance(edited, KFAC) and isinstance(base, KFAC):
        pairs = [(edited.factors[name], base.factors[name]) for name in base.factors]
        job.counts["edits_input_share"] = fmean(_share(own.a_sum, other.a_sum) for own, other in pairs)
        job.counts["edits_gradient_share"] = fmean(_share(own.s_sum, other.s_sum) for own, other in pairs)


def _share(own: Tensor, other: Tensor) -> float:
    """tr(own) of tr(own + other)."""
    mine = float(own.trace())
    return mine / max(mine + float(other.trace()), 1e-300)
