"""One file a claim: statement, idea of the proof, what is measured, the bound, a negative control."""

from curvlab.theory.check import Case, Check, Claim, Findings
from curvlab.theory.null_space import (
    inclusion_strict_or_equal,
    null_space_inclusion,
    unseen_updates_change_nothing,
)
from curvlab.theory.setting import LOSSES, Setting, random_setting

__all__ = [
    "LOSSES", "Case", "Check", "Claim", "Findings", "Setting", "inclusion_strict_or_equal", "null_space_inclusion",
    "random_setting", "unseen_updates_change_nothing",
]  # fmt: skip
