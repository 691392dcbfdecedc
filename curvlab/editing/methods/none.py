"""No edit: the base model, the row that all others are held against."""

from dataclasses import dataclass

from curvlab.editing.job import Job, editor


@dataclass(frozen=True)
class NoOptions:
    """Nothing to choose."""


@editor("none", NoOptions)
def none(job: Job, options: NoOptions) -> None:
    """The model as it is."""
