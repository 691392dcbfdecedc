"""Fine-tuning of the edited layers without a constraint: all requests together, chunk by chunk, or in one layer."""

from dataclasses import dataclass

from curvlab.editing.job import Job, editor
from curvlab.editing.training import Training


@editor("ft", Training)
def ft(job: Job, options: Training) -> None:
    """Fine-tuning on the targets, all requests together (EasyEdit's FT-M: prompts masked)."""
    job.train(options.optimise(job.parameters()), options)


@dataclass(frozen=True)
class Sequential(Training):
    """Training in rounds; `chunk` requests a round, each starting where the last one ended."""

    chunk: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}")


@editor("ft-seq", Sequential)
def ft_seq(job: Job, options: Sequential) -> None:
    """Fine-tuning chunk by chunk, with a new optimiser each."""
    for start in range(0, len(job.requests), options.chunk):
        chunk = job.requests[start : start + options.chunk]
        job.train(options.optimise(job.parameters()), options, requests=chunk, seed=job.seed + start)


@editor("locbf-ft", Training)
def locbf_ft(job: Job, options: Training) -> None:
    """Fine-tuning of one layer, the second highest of the edited ones, breadth first (Yang et al. 2025)."""
    (layer,) = job.layers[-2:][:1]
    job.train(options.optimise(job.parameters([layer])), options, layers=[layer])
