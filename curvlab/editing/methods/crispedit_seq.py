"""CrispEdit-Seq (paper, Algorithm 2): rounds of edits, each protecting the capability set and all earlier rounds."""

from dataclasses import dataclass
from typing import Any, Literal

from curvlab.capture import Batch
from curvlab.curvature import KFAC, Covariance
from curvlab.editing.job import Job, editor
from curvlab.editing.methods.crispedit import Constrained, constrained_training
from curvlab.losses import CrossEntropy


@dataclass(frozen=True)
class ConstrainedSequential(Constrained):
    """Constrained training in rounds.

    Attributes:
        chunk: requests a round.
        weights: how statistics are merged: "tokens" (the authors': every token counts alike, so that a few
            capability documents drown under many edits) or "share" (`share` for the capability set, the rest for
            all rounds together, by tokens).
        share: the capability set's share, for weights="share".
        mask_factors: take the edits' factors from the target's loss alone (False, the paper's: from every next
            token of prompt and target).
        drift: None only: a round keeps its projector (Algorithm 2).
        epsilon: of an ellipsoid, a round: its centre is where the round began.
    """

    chunk: int = 100
    weights: Literal["tokens", "share"] = "tokens"
    share: float = 0.5
    mask_factors: bool = False
    gamma: float = 0.999
    drift: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drift is not None:
            raise ValueError(
                "Algorithm 2 keeps a round's projector: drift must be None; smaller chunks refit more often"
            )
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}")
        if self.weights not in ("tokens", "share"):
            raise ValueError(f"weights must be 'tokens' or 'share', got {self.weights!r}")
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie strictly between 0 and 1, got {self.share}")
        if self.curvature == "ekfac":
            raise ValueError("EK-FAC's eigenvalues live in one basis and do not merge over rounds; use 'kfac'")
        if self.curvature == "covariance" and self.weights == "share":
            raise ValueError("covariances are merged by tokens: use weights='tokens', or curvature='kfac'")


@editor("crispedit-seq", ConstrainedSequential)
@editor("crispedit-seq-eps", ConstrainedSequential, constraint="ellipsoid", weights="share")
def crispedit_seq(job: Job, options: ConstrainedSequential) -> None:
    """Algorithm 2: chunk by chunk, the factors of each round's edits merged into those of the capability set."""
    capability = job.needs_capability()
    base = job.timed(capability.statistics, job.model, job.tokenizer, job.layers, options.curvature)
    rounds: Any = None
    for start in range(0, len(job.requests), options.chunk):
        chunk = job.requests[start : start + options.chunk]
        kind: Any = type(base)
        if rounds is None:
            merged = base
        elif options.weights == "tokens":
            merged = kind.merge(base, rounds)
        else:
            merged = kind.merge(base, rounds, weights=[options.share, 1 - options.share])
        constraint = options.of(merged.spectrum())
        constrained_training(job, options, constraint, requests=chunk, seed=job.seed + start)
        if start + options.chunk >= len(job.requests):
            break  # no round follows that would need the last one's factors
        batches = options.encode(job.tokenizer, chunk, mask_prompt=options.mask_factors, batch_size=options.batch_size)
        new = _statistics(job, options, batches, job.seed + start)  # a round's requests are not needed again
        rounds = new if rounds is None else kind.merge(rounds, new)


def _statistics(job: Job, options: ConstrainedSequential, batches: list[Batch], seed: int) -> KFAC | Covariance:
    loss = CrossEntropy()
    if options.curvature == "covariance":
        return Covariance.fit(job.model, loss, batches, job.layers)
    return KFAC.fit(job.model, loss, batches, job.layers, labels=job.needs_capability().labels, seed=seed)
