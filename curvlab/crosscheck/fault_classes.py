"""What a fault class is, and the classes of how statistics are computed; masks and files have their own modules.

To add one: a function under `fault(...)` that changes the run at its stage, with the sentence that says what it does.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from curvlab.crosscheck.artefacts import Run, Storage
from curvlab.crosscheck.findings import Severity
from curvlab.crosscheck.production import Choices

Stage = Literal["choices", "factors", "cache", "update", "files"]
STAGES: tuple[Stage, ...] = get_args(Stage)


class NoDifference(ValueError):
    """The fault leaves this artefact as it was; another seed, shape or spectrum is needed to show it."""


@dataclass(frozen=True)
class Fault:
    """A class of faults.

    Attributes:
        does: what it does to a correct artefact, in one sentence.
        severities: at one of these it must be reported.
        stage: "choices": how statistics are computed (`Choices`), to be seen only with the model and data at hand.
        storages: the formats in which it can be made.
        change: of the choices, the run or the files, as the stage says.
        gamma: whether it shows only to a check that is told γ.
        ours: whether it is told from our own conventions alone (the authors' contain it or hide it).
        authors: whether it is made in the authors' conventions alone.
    """

    name: str
    does: str
    severities: tuple[Severity, ...]
    stage: Stage
    storages: tuple[Storage, ...]
    change: Callable[..., Any]
    gamma: bool = False
    ours: bool = False
    authors: bool = False

    @property
    def model(self) -> bool:
        """Whether the model and data are needed to see it."""
        return self.stage == "choices"


FAULTS: dict[str, Fault] = {}

ERROR: tuple[Severity, ...] = ("error",)
VISIBLE: tuple[Severity, ...] = ("error", "deviation")
NAMED: tuple[Severity, ...] = ("error", "deviation", "convention")
CACHED: tuple[Storage, ...] = ("authors", "edit")
FACTORED: tuple[Storage, ...] = ("authors", "edit", "kronfluence")
MOMENTS: tuple[Storage, ...] = ("rome", "alphaedit")


def fault(
    name: str, does: str, severities: tuple[Severity, ...], stage: Stage, storages: tuple[Storage, ...], **flags: bool
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the change below it; `flags` are those of `Fault`."""

    def register(change: Callable[..., Any]) -> Callable[..., Any]:
        FAULTS[name] = Fault(name, does, severities, stage, storages, change, **flags)
        return change

    return register


def coin(run: Run) -> bool:
    """One of two ways, drawn with the run's generator."""
    return bool(torch.randint(2, (), generator=run.generator))


# --- how statistics are computed -------------------------------------------------------------------------------------


def _choice(
    name: str, does: str, severities: tuple[Severity, ...], storages: tuple[Storage, ...], flags: str = "", **new: Any
) -> None:
    def change(choices: Choices) -> Choices:
        drop = choices.drop | new.get("drop", frozenset())
        return replace(choices, **(new | {"drop": drop}))

    fault(name, does, severities, "choices", storages, **dict.fromkeys(flags.split(), True))(change)


_choice(
    "unnormalised-sums", "A and B are sums over positions that were never divided by N.", NAMED, CACHED, divide=False
)
_choice(
    "mean-reduced-gradients", "g comes from the mean loss of each batch, so that B carries 1/n² of each batch.",
    NAMED, FACTORED, mean_loss=True,
)  # fmt: skip
_choice(
    "per-batch-gradients", "Gradients are added up over each batch before g gᵀ, which mixes examples.",
    NAMED, CACHED, "authors", per_batch=True,
)  # fmt: skip
_choice(
    "per-batch-squares", "EK-FAC's eigenvalues square the gradient of each batch, not of each example.",
    NAMED, ("kronfluence",), batch_squares=True,
)  # fmt: skip
_choice(
    "centred-covariance", "The mean of a is taken off, so that the direction that all inputs share is lost.",
    NAMED, FACTORED + MOMENTS, centred=True,
)  # fmt: skip
_choice(
    "padding-counted", "Padding enters A as if it were text, and N counts it.", NAMED, FACTORED + MOMENTS, padding=True
)
_choice(
    "first-position-dropped", "The first position of each document is left out of A and B.",
    NAMED, CACHED, "ours", drop=frozenset({"first"}),
)  # fmt: skip
_choice(
    "last-position-dropped", "The last position of each document, which predicts nothing, is left out of A.",
    NAMED, CACHED, "ours", drop=frozenset({"last"}),
)  # fmt: skip
_choice(
    "prompt-positions-dropped", "Positions of the prompt, which carry no loss, are left out of A and B.",
    NAMED, CACHED, "ours", drop=frozenset({"prompt"}),
)  # fmt: skip
_choice(
    "empirical-labels", "g is taken at the labels of the data instead of the model's own distribution.",
    NAMED, CACHED, "ours", labels="data",
)  # fmt: skip
_choice(
    "bias-joined", "A one is joined to a for the bias, so that A has d_in + 1 rows.", NAMED, ("authors",), bias=True
)
_choice(
    "float32-accumulation", "A million tokens were added one by one to float32 sums, which lost digits.",
    VISIBLE, CACHED, "authors", float32=True,
)  # fmt: skip
_choice(
    "damped-factor", "A twentieth of the mean eigenvalue was added to every eigenvalue (damping).",
    VISIBLE, CACHED, damping=0.05,
)  # fmt: skip
_choice("stale-factors", "The weights have moved by a fifth since the factors were taken.", ERROR, FACTORED, drift=0.2)
_choice("other-layer", "The factors are those of another layer of the same shape.", ERROR, FACTORED, other_layer=True)


# --- factors ---------------------------------------------------------------------------------------------------------


@fault("asymmetric-factor", "A is filled on one side of its diagonal only, or has noise that is not symmetric.",
       VISIBLE, "factors", FACTORED + MOMENTS)  # fmt: skip
def _asymmetric(run: Run) -> None:
    if coin(run):
        run.A = run.A.triu()
    else:
        noise = torch.randn(run.A.shape, generator=run.generator, dtype=torch.float64)
        run.A = run.A + 0.02 * run.A.abs().max() * noise


@fault("indefinite-factor", "A has a negative eigenvalue far beyond round-off.", VISIBLE, "factors", FACTORED + MOMENTS)
def _indefinite(run: Run) -> None:
    values, U = torch.linalg.eigh(run.A)
    values[0] = -0.05 * values[-1]
    run.A = (U * values) @ U.mT


@fault("rank-above-samples", "N counts documents where A was summed over tokens: A has more rank than N allows.",
       NAMED, "factors", FACTORED + MOMENTS)  # fmt: skip
def _rank(run: Run) -> None:
    rank = int(torch.linalg.matrix_rank(run.A, hermitian=True, rtol=1e-5))
    if rank < 2:
        raise NoDifference("one sample is enough for this factor")
    run.count = max(1, rank // 2)
