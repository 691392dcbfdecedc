"""What the paper's tables compare: the methods, the settings each is tuned over, and the edits behind each table."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from editing_bench import Setup

Options = tuple[tuple[str, Any], ...]  # of an editor, by name; hashable

# editor → its name in the paper's tables; below, those that the paper has not
PAPER_NAMES = {
    "none": "base", "memit": "MEMIT", "alphaedit": "AlphaEdit", "adam-nscl": "Adam-NSCL", "locbf-ft": "LocBF-FT",
    "ultraedit": "UltraEdit", "mend": "MEND", "ft": "FT", "ft-seq": "FT Sequential", "lora": "LoRA",
    "lora-seq": "LoRA Sequential", "crispedit": "CrispEdit", "crispedit-seq": "CrispEdit-Seq",
}  # fmt: skip
NAMES = PAPER_NAMES | {
    "rome": "ROME", "ewc": "EWC", "kfac-penalty": "K-FAC penalty", "replay": "replay",
    "crispedit-ekfac": "CrispEdit (EK-FAC)", "crispedit-eps": "CrispEdit-ε",
}  # fmt: skip
IN_ROUNDS = ("ft-seq", "lora-seq", "crispedit-seq", "alphaedit", "ultraedit")  # take a chunk of requests a round
LOCATING = ("rome", "memit", "alphaedit")  # at the subject's last token, in layers of their own
TRAINED = (
    "ft", "ft-seq", "locbf-ft", "lora", "lora-seq", "adam-nscl", "ewc", "kfac-penalty", "replay", "crispedit",
    "crispedit-ekfac", "crispedit-eps", "crispedit-seq",
)  # fmt: skip


def _options(**options: Any) -> Options:
    return tuple(sorted(options.items()))


def _grid(name: str, *values: Any, **fixed: Any) -> tuple[Options, ...]:
    return tuple(_options(**{name: value}, **fixed) for value in values)


FEW = 0.03  # of the capability documents: thirty of a thousand, as the paper's CrispEdit-Seq has

# of the locate-and-edit methods; "ignored" edits at the prompt's last token instead of the subject's: in a model of two
# layers the subject's token does not know yet what is asked, and five facts share it
LOCATED: dict[str, Any] = {"prefixes": 2, "damping": 1e-2}
NULL: dict[str, Any] = {"prefixes": 2, "gamma": 0.9}
LORA = (  # the first is the paper's
    _options(variant="adalora", lr=5e-3), _options(variant="adalora", lr=1e-2), _options(variant="adalora", lr=2e-3),
    _options(variant="lora", lr=1e-3),
)  # fmt: skip


# Every method has four settings to choose from: the same budget. The first is taken where nothing is tuned. They lie
# around each method's best of a run over wider ones on the train half (figures/results/paper/tuning.csv).
GRIDS: dict[str, tuple[Options, ...]] = {
    "none": ((),),
    "ft": _grid("lr", 2e-3, 1e-3, 3e-3, 5e-3),
    "ft-seq": _grid("lr", 1e-3, 5e-4, 2e-3, 5e-3),
    "locbf-ft": _grid("lr", 5e-3, 2e-3, 1e-2, 2e-2),
    "lora": LORA,
    "lora-seq": LORA,
    "adam-nscl": _grid("ratio", 30.0, 10.0, 100.0, 1000.0, lr=5e-3),
    "ewc": _grid("strength", 1e1, 1e0, 3e1, 1e2, lr=5e-3),
    "kfac-penalty": _grid("strength", 1e0, 3e-1, 3e0, 1e1, lr=5e-3),
    "replay": _grid("strength", 1.0, 0.3, 3.0, 10.0, lr=5e-3),
    "crispedit": _grid("gamma", 0.9, 0.7, 0.8, 0.95, lr=5e-3),
    "crispedit-ekfac": _grid("gamma", 0.8, 0.7, 0.9, 0.95, lr=5e-3),
    "crispedit-eps": _grid("epsilon", 3e-2, 1e-2, 1e-1, 3e-1, lr=5e-3),
    "crispedit-seq": _grid("gamma", 0.95, 0.8, 0.9, 0.99, lr=5e-3),
    "rome": (
        _options(subject="ignored", clamp=0.75, **LOCATED),
        _options(subject="ignored", clamp=2.0, **LOCATED),
        _options(subject="last-token", clamp=0.75, **LOCATED),
        _options(subject="ignored", clamp=0.3, **LOCATED),
    ),
    "memit": (
        _options(subject="ignored", weight=1e1, **LOCATED),
        _options(subject="ignored", weight=1e0, **LOCATED),
        _options(subject="ignored", weight=3e1, **LOCATED),
        _options(subject="last-token", weight=1e2, **LOCATED),
    ),
    "alphaedit": (
        _options(subject="ignored", l2=1e1, **NULL),
        _options(subject="ignored", l2=3e1, **NULL),
        _options(subject="last-token", l2=1e2, **NULL),
        _options(subject="last-token", l2=3e1, **NULL),
    ),
    "ultraedit": _grid("lr", 5e-3, 2e-3, 1e-2, 2e-2),
    "mend": (
        _options(edit_lr=1e-2, c_edit=0.02),
        _options(edit_lr=1e-2, c_edit=0.05),
        _options(edit_lr=1e-2, c_edit=0.01),
        _options(edit_lr=1e-2, c_edit=0.1),
    ),
}

# The paper's and its sources' own settings, for real models; γ and n as for its 3,000 CounterFact edits.
AUTHORS: dict[str, Options] = {
    **dict.fromkeys(("none", "rome", "mend"), ()),  # the defaults of ours are theirs
    **dict.fromkeys(("ft", "ft-seq", "locbf-ft"), (("lr", 5e-4),)),
    **dict.fromkeys(("lora", "lora-seq"), (("epochs", 70), ("lr", 5e-3))),
    **dict.fromkeys(("crispedit", "crispedit-ekfac"), (("gamma", 0.9), ("lr", 5e-4))),
    "crispedit-seq": (("gamma", 0.999), ("lr", 5e-4)),
    "crispedit-eps": (("epsilon", 1e-3), ("lr", 5e-4)),
    "adam-nscl": (("lr", 5e-4), ("ratio", 10.0)),
    "ewc": (("lr", 5e-4), ("strength", 1e2)),
    "kfac-penalty": (("lr", 5e-4), ("strength", 1e1)),
    "replay": (("lr", 5e-4), ("strength", 1.0)),
    "memit": (("weight", 15000.0),),
    "alphaedit": (("l2", 10.0), ("threshold", 2e-2)),
    "ultraedit": (("lr", 1e-6),),
}


@dataclass(frozen=True)
class Wanted:
    """A line of a table: an edit, and what the table calls it.

    Attributes:
        options: None takes those that the editor was tuned to.
        value: the number that the table varies; NaN where it varies none.
    """

    table: str
    row: str
    setup: Setup
    editor: str
    options: Options | None = None
    value: float = float("nan")


@dataclass(frozen=True)
class Base:
    """What a plan builds on.

    Attributes:
        setup: of one edit set and seed, on the half that is not tuned on.
        available: requests that this half holds.
        second: the other model family, of Table 5; "" for none.
        seq_documents: that CrispEdit-Seq takes its capability curvature on, in the tables that compare methods.
        crispedit, seq: the first settings of CrispEdit and CrispEdit-Seq, of which a table varies one.
    """

    setup: Setup
    available: int
    second: str
    seq_documents: int
    crispedit: Options
    seq: Options

    def line(self, table: str, setup: Setup, editor: str) -> Wanted:
        """A method with the settings it was tuned to."""
        if editor == "crispedit-seq":
            setup = replace(setup, n_capability=self.seq_documents)
        return Wanted(table, NAMES[editor], setup, editor)


Lines = Callable[[Base], Iterator[Wanted]]


def table1(base: Base) -> Iterator[Wanted]:
    """All methods. Also behind Table 3, Figs. 1, 4 and 7 and Appendix F."""
    for name in NAMES:
        yield base.line("table1", base.setup, name)


def table4(base: Base) -> Iterator[Wanted]:
    """Three times the edits, with the settings found for a third of them."""
    more = replace(base.setup, n_edits=3 * base.setup.n_edits)
    if more.n_edits <= base.available:
        for name in ("none", "locbf-ft", "ultraedit", "adam-nscl", "alphaedit", "ft", "crispedit"):
            yield base.line("table4", more, name)


def table5(base: Base) -> Iterator[Wanted]:
    """Another model family."""
    if base.second:
        other = replace(base.setup, model=base.second)
        for name in ("none", "ft", "locbf-ft", "alphaedit", "ultraedit", "adam-nscl", "crispedit", "crispedit-seq"):
            yield base.line("table5", other, name)


def table6(base: Base) -> Iterator[Wanted]:
    """Which loss and which positions the edits' factors are taken from, and at whose labels: why masking fails.

    As in the paper few capability documents and γ = 0.999, where the edits' factors count for most of the sum.
    """
    few = with_documents(base.setup, FEW)
    yield Wanted("table6", NAMES["none"], few, "none")
    for labels in ("data", "model"):
        setup = replace(few, labels=labels)
        for row, masked, positions in (
            ("whole text", False, "all"), ("target only", True, "loss"), ("target's loss, all positions", True, "all")
        ):  # fmt: skip
            options = with_options(base.seq, gamma=0.999, mask_factors=masked, factor_positions=positions)
            yield Wanted("table6", f"{row}, {labels} labels", setup, "crispedit-seq", options)


def table7(base: Base) -> Iterator[Wanted]:
    """The size of the capability set, none and another one included. Also behind Fig. 5."""
    setup, most, options = base.setup, base.setup.n_capability, with_options(base.crispedit, gamma=0.9)
    yield Wanted("table7", NAMES["none"], setup, "none")
    yield Wanted("table7", "No Projection (FT)", setup, "ft", with_options(base.crispedit, gamma=None), 0)
    for share in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0):
        sized = with_documents(setup, share)
        n = sized.n_capability
        yield Wanted("table7", f"n = {n}", sized, "crispedit", options, n)
    stories = replace(setup, capability="stories")
    if setup.embedded and setup.capability == "world":
        yield Wanted("table7", "stories only", stories, "crispedit", options, most)


def table8(base: Base) -> Iterator[Wanted]:
    """γ."""
    yield Wanted("table8", NAMES["none"], base.setup, "none")
    for gamma in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99):
        options = with_options(base.crispedit, gamma=gamma)
        yield Wanted("table8", f"γ = {gamma:g}", base.setup, "crispedit", options, gamma)


def merge(base: Base) -> Iterator[Wanted]:
    """How Seq weights the capability set against earlier edits: by tokens, or a fixed share; few documents and many."""
    yield Wanted("merge", NAMES["none"], base.setup, "none")
    for setup in (with_documents(base.setup, FEW), base.setup):
        n = setup.n_capability
        yield Wanted("merge", f"tokens, n = {n}", setup, "crispedit-seq", with_options(base.seq, weights="tokens"), n)
        for share in (0.5, 0.9):
            options = with_options(base.seq, weights="share", share=share)
            yield Wanted("merge", f"share {share:g}, n = {n}", setup, "crispedit-seq", options, n)


PLANS: dict[str, Lines] = {
    "table1": table1, "table4": table4, "table5": table5, "table6": table6, "table7": table7, "table8": table8,
    "merge": merge,
}  # fmt: skip
BEHIND = {"table3": "table1", "fig1": "table1", "fig4": "table1", "fig7": "table1", "cases": "table1", "fig5": "table7"}


def plans_of(tables: tuple[str, ...]) -> list[str]:
    """The names in `PLANS` whose edits the tables and figures are made of, each once; "all" stands for all.

    Raises:
        ValueError: an unknown name.
    """
    known = {**dict.fromkeys(PLANS), **dict.fromkeys(BEHIND), "all": None}
    unknown = sorted(set(tables) - set(known))
    if unknown or not tables:
        raise ValueError(f"--tables: unknown {unknown}; choose from {', '.join(known)}")
    asked = set(PLANS) if "all" in tables else {BEHIND.get(name, name) for name in tables}
    return [name for name in PLANS if name in asked]


def with_documents(setup: Setup, share: float) -> Setup:
    """The setup with a share of its capability documents, at least two."""
    return replace(setup, n_capability=max(2, round(share * setup.n_capability)))


def with_options(options: Options, **changed: Any) -> Options:
    """Options with some set anew; None takes one away."""
    return tuple(sorted((k, v) for k, v in (dict(options) | changed).items() if v is not None))


def describe(options: Options) -> str:
    """Options in a few words."""
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in options)
