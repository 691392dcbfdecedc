"""Claims as objects: a statement, the cases it was put to, what was measured, the bound, a verdict."""

import functools
import inspect
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, ParamSpec

import torch

from curvlab.losses import as_loss

Verdict = Literal["holds", "refuted", "holds under conditions"]
P = ParamSpec("P")


@dataclass(frozen=True)
class Case:
    """One comparison behind a verdict.

    Attributes:
        name: what was compared.
        measured, bound: the two numbers; the bound is known before anything is measured.
        should: whether it is expected to hold; None where it is an empirical finding, a result either way.
        relation: how `measured` must relate to `bound`.
        control: a deliberately wrong variant, which the check must reject; it does not enter the verdict.
    """

    name: str
    measured: float
    bound: float
    should: bool | None = True
    relation: Literal["<=", ">="] = "<="
    control: bool = False

    @property
    def holds(self) -> bool:
        """Whether the comparison is true; not a number never is."""
        return self.measured <= self.bound if self.relation == "<=" else self.measured >= self.bound

    @property
    def as_expected(self) -> bool:
        return not math.isnan(self.measured) and self.should in (None, self.holds)


def control(name: str, measured: float, bound: float, relation: Literal["<=", ">="] = "<=") -> Case:
    """A deliberately wrong variant."""
    return Case(name, measured, bound, False, relation, True)


@dataclass(frozen=True)
class Findings:
    """What a claim's function returns: its cases (the main one first), and numbers for a figure."""

    cases: list[Case]
    series: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """A claim that was checked.

    Attributes:
        claim: its number in the ledger.
        name: the function that checked it.
        statement: what is claimed.
        idea: why it should be so, and what the control is.
        source: where it is claimed.
        setting: what it was checked on.
        cases: the comparisons, the main one first.
        series: numbers for a figure.
        seconds: wall time.
    """

    claim: int
    name: str
    statement: str
    idea: str
    source: str
    setting: str
    cases: tuple[Case, ...]
    series: dict[str, Any]
    seconds: float

    @property
    def verdict(self) -> Verdict:
        """Over all cases that are no controls: all hold, none holds, or some do."""
        own = [case.holds for case in self.cases if not case.control]
        return "holds" if all(own) else "holds under conditions" if any(own) else "refuted"

    @property
    def passed(self) -> bool:
        """Whether every case came out as expected, the controls rejected."""
        return all(case.as_expected for case in self.cases)

    @property
    def measured(self) -> float:
        """Of the main case, as its bound."""
        return self.cases[0].measured

    @property
    def bound(self) -> float:
        return self.cases[0].bound

    def row(self) -> dict[str, Any]:
        """For JSON."""
        cases = [
            {
                "name": case.name, "measured": case.measured, "relation": case.relation, "bound": case.bound,
                "holds": case.holds, "should": case.should, "control": case.control,
            }
            for case in self.cases
        ]  # fmt: skip
        return {
            "claim": self.claim, "name": self.name, "statement": self.statement, "idea": self.idea,
            "source": self.source,
            "setting": self.setting, "measured": self.measured, "bound": self.bound, "verdict": self.verdict,
            "passed": self.passed, "seconds": self.seconds, "cases": cases, "series": self.series,
        }  # fmt: skip


class Claim(Generic[P]):
    """A function that checks one claim. Its docstring's first paragraph is the statement; calling it gives a `Check`.

    Every claim takes `setting`, a name for what it is checked on, beside its own arguments.
    """

    def __init__(self, function: Callable[P, Findings], number: int, source: str) -> None:
        functools.update_wrapper(self, function)
        self.function, self.number, self.source = function, number, source

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def statement(self) -> str:
        """The first paragraph of the docstring, on one line."""
        return " ".join((self.function.__doc__ or "").strip().split("\n\n")[0].split())

    @property
    def idea(self) -> str:
        """The paragraphs after it: why it should be so, and what the control is."""
        paragraphs = (self.function.__doc__ or "").strip().split("\n\n")[1:]
        return "\n\n".join(" ".join(p.split()) for p in paragraphs if not p.strip().startswith("Args:"))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Check:
        return self.on("", *args, **kwargs)

    def on(self, setting: str, *args: P.args, **kwargs: P.kwargs) -> Check:
        """The check, with a name for the setting.

        A `model` must return a tensor in float32 or float64, `data` yield (inputs, targets); losses may be torch's.
        """
        bound = inspect.signature(self.function).bind(*args, **kwargs)
        bound.arguments |= _prepared(bound.arguments)
        started = time.perf_counter()
        found = self.function(*bound.args, **bound.kwargs)
        seconds = time.perf_counter() - started
        if not found.cases:
            raise ValueError(f"{self.name} compared nothing: nothing in this setting meets its conditions")
        return Check(
            self.number,
            self.name,
            self.statement,
            self.idea,
            self.source,
            setting,
            tuple(found.cases),
            found.series,
            seconds,
        )


def _prepared(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Subjects as claims take them: data as lists (several passes, no workers), losses as ours.

    Raises:
        ValueError: what no claim can be checked on.
    """
    out: dict[str, Any] = {}
    for name, value in arguments.items():
        if name == "loss":
            out[name] = as_loss(value)
        elif name in ("data", "capability", "sample"):
            out[name] = list(value)
            if not out[name] or any(len(b) != 2 or not isinstance(b[0], torch.Tensor) for b in out[name]):
                raise ValueError(f"{name} must yield (inputs, targets) batches of tensors, at least one")
    model = arguments.get("model")
    if model is not None and "data" in out:
        dtype = next(model.parameters()).dtype
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"claims are checked in float64 or float32, the model is {dtype}: bounds would be empty")
        with torch.no_grad():
            y = model(out["data"][0][0])
        if not isinstance(y, torch.Tensor):
            raise ValueError(f"the model returns a {type(y).__name__}; wrap it in a module that returns the tensor")
    return out


def claim(number: int, source: str) -> Callable[[Callable[P, Findings]], Claim[P]]:
    """Make a function that returns `Findings` into a claim of the ledger.

    Args:
        number: in the ledger.
        source: where it is claimed: the paper's proposition or section, a review, or "ours".
    """

    def decorate(function: Callable[P, Findings]) -> Claim[P]:
        return Claim(function, number, source)

    return decorate


def roundoff(dtype: torch.dtype, n: int) -> float:
    """Relative error to be expected of sums of n terms and of factorisations of size n: 64 √n units of rounding."""
    return 64 * math.sqrt(max(n, 1)) * torch.finfo(dtype).eps


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; the norm of `actual` itself where the other is zero."""
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = float(torch.linalg.vector_norm(expected))
    return float(torch.linalg.vector_norm(actual - expected)) / (scale or 1.0)
