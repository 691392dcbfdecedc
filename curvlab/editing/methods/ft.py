"""Fine-tuning of the edited layers without a constraint: all requests together, chunk by chunk, or in one layer."""

from curvlab.editing.job import Job, editor
from curvlab.editing.training import Sequential, Training


@editor("ft", Training)
def ft(job: Job, options: Training) -> None:
    """Fine-tuning on the targets, all requests together (EasyEdit's FT-M: prompts masked)."""
    job.train(options.optimise(job.parameters()), options)


@editor("ft-seq", Sequential)
def ft_seq(job: Job, options: Sequential) -> None:
    """Fine-tuning chunk by chunk, with a new optimiser each."""
    for requests, seed in options.rounds(job.requests, job.seed):
        job.train(options.optimise(job.parameters()), options, requests=requests, seed=seed)


@editor("locbf-ft", Training)
def locbf_ft(job: Job, options: Training) -> None:
    """Fine-tuning of one layer, the second highest of the edited ones, breadth first (Yang et al. 2025)."""
    (layer,) = job.layers[-2:][:1]
    job.train(options.optimise(job.parameters([layer])), options, layers=[layer])
