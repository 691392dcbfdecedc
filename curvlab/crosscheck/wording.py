"""What a convention other than ours means, in words: severity, fault, consequence and remedy of each choice."""

from typing import NamedTuple

from curvlab.crosscheck.findings import Severity
from curvlab.crosscheck.structures import Fit


class Remark(NamedTuple):
    severity: Severity
    fault: str | None
    cause: str
    remedy: str = ""


_POSITIONS: dict[str, Remark] = {
    "padding counted": Remark(
        "deviation", "padding-counted",
        "padding is counted as if it were text: what the layer computes there is protected at the text's expense",
        "select real positions by the attention mask before summing",
    ),
    "last position": Remark(
        "convention", "last-position-dropped",
        "the last position of each document is left out, as the authors do: it predicts nothing, but edits act on it",
    ),
    "last column": Remark(
        "convention", "last-position-dropped",
        "the last column of each batch is left out (a shift [:, :-1]): the last token of its longest documents, and "
        "padding of the others",
        "drop positions by the attention mask of the shifted labels, not by column",
    ),
    "first position": Remark(
        "convention", "first-position-dropped",
        "the first position of each document is left out: an edit may change what the layer does there freely",
        "count it too, unless it is the same token (begin of text) everywhere and meant to be left out",
    ),
    "prompt positions": Remark(
        "deviation", "prompt-positions-dropped",
        "positions whose label is ignored (masked prompts) are left out, though later predictions attend to them: a "
        "direction that is null on the others need not be null for the model",
        "count every real position; only the loss is masked",
    ),
}  # fmt: skip


def remarks(fit: Fit, proportional: bool) -> list[Remark]:
    """One for each choice that is not ours; none where all are.

    `proportional`: whether all batches (documents) weigh alike on these data, so that a mean over each only scales.
    """
    structure, side = fit.structure, fit.structure.side
    out = []
    if structure.labels == "data":
        out.append(Remark(
            "convention", "empirical-labels",
            "gradients are at the data's labels (empirical Fisher, as in the authors' code), not at labels drawn from "
            "the model: this equals the GGN only in expectation over the model's own predictions",
            "draw labels from the model where A ⊗ S shall approximate the GGN",
        ))  # fmt: skip
    out += [remark for words, remark in _POSITIONS.items() if words in structure.positions]
    if structure.centred:
        out.append(Remark(
            "deviation", "centred-covariance",
            "the mean was taken off (a covariance): the direction of the mean counts as flat though every example "
            "moves along it",
            "sum the outer products without subtracting the mean",
        ))  # fmt: skip
    out += _form(fit)
    if structure.weight.startswith("mean over each") and side != "A":
        every = structure.weight.removeprefix("mean over ")
        cause = f"the loss was a mean over {every}, so that gradients carry one over its number of loss terms"
        out.append(
            Remark("convention", "mean-reduced-gradients", f"{cause}: here only a common scale", _SCALE)
            if proportional
            else Remark(
                "deviation", "mean-reduced-gradients", f"{cause}: short ones outweigh long ones by the square",
                "use reduction='sum', and divide the sums once at the end",
            )
        )  # fmt: skip
    if structure.weight.endswith("alike"):
        every = structure.weight.removesuffix(" alike")
        out.append(
            Remark("convention", None, f"a mean of the means of {every}: {every} count alike, whatever their length")
        )
    if structure.bias != "none":
        place = "" if structure.bias == "last" else ", in the first place"
        out.append(Remark("convention", "bias-joined", f"a one for the bias is joined to the inputs{place}"))
    return out + _scale(fit)


_SCALE = "nothing for a γ mask, which a common scale does not change; divide before choosing an ε"


def _form(fit: Fit) -> list[Remark]:
    side, form = fit.structure.side, fit.structure.form
    if side == "eigenvalues":
        if form == "batch":
            return [Remark(
                "deviation", "per-batch-squares",
                "squares of each batch's summed gradient instead of each example's: examples of a batch cancel or add "
                "up, and their number of draws is that of batches",
                "square the gradients of single examples before adding them up",
            )]  # fmt: skip
        if form == "position":
            return [Remark("convention", None, "squares of single positions' gradients: positions count as examples")]
        return []
    if form == "batch":
        fault = "per-batch-gradients" if side == "S" else "per-batch-inputs"
        return [Remark(
            "deviation", fault,
            "outer products of sums over a whole batch: the rank is at most the number of batches, and what differs "
            "within a batch is lost",
            "take the outer product of each position's (or example's) vector before adding up",
        )]  # fmt: skip
    if form == "example":
        return [Remark("convention", None, "summed over each example's positions first (K-FAC 'reduce')")]
    return []


def _scale(fit: Fit) -> list[Remark]:
    formula = fit.formula
    if formula is None:
        return [Remark(
            "deviation", None, f"its scale, {fit.factor:.4g} times the sum, is none of the counts", _SCALE
        )]  # fmt: skip
    if formula == "un-normalised sum" and not abs(fit.value - 1) > 0 and _own(fit) != formula:
        return [Remark("convention", "unnormalised-sums", "a plain sum, not divided by a count", _SCALE)]
    if formula != _own(fit):
        if formula == "per position, padding included":
            return [Remark(
                "deviation", "padding-counted",
                f"divided by all positions, padding among them (ours is {_own(fit)}): here this only scales it",
                "divide by the number of real positions",
            )]  # fmt: skip
        return [Remark("convention", None, f"scaled {formula} where ours is {_own(fit)}", _SCALE)]
    return []


def _own(fit: Fit) -> str:
    structure = fit.structure
    if structure.side != "A":
        return "per loss term" if structure.form != "batch" else "per batch"
    by_form = {"example": "per document", "batch": "per batch"}
    by_weight = {"batches alike": "per batch", "documents alike": "per document"}
    return by_form.get(structure.form) or by_weight.get(structure.weight) or "per position"
