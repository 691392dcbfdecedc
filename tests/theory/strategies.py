"""Random settings for property tests: architecture, activation, loss, sizes, dtype and seed all drawn."""

import os
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st

from curvlab.theory import LOSSES, Setting, random_setting

# CURVLAB_TEST_EFFORT=50 pytest tests/theory: a thorough run for a night, other random cases each time
EFFORT = int(os.environ.get("CURVLAB_TEST_EFFORT", "1"))


def cases(n: int) -> Callable[[Any], Any]:
    """How many random cases a property test takes; the same ones each time, unless thorough."""
    return settings(max_examples=n * EFFORT, derandomize=EFFORT == 1)


KINDS = ("mlp", "conv", "sequence")


def random_settings(
    kinds: tuple[str, ...] = KINDS,
    activations: tuple[str, ...] = ("relu", "tanh", "gelu", "identity"),
    losses: tuple[str, ...] = tuple(LOSSES),
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
    examples: tuple[int, int] = (1, 6),
    width: tuple[int, int] = (2, 5),
    depth: tuple[int, int] = (1, 3),
) -> st.SearchStrategy[Setting]:
    """Settings as `random_setting` makes them; pairs are inclusive ranges."""

    def build(kind: str, activation: str, loss: str, dtype: torch.dtype, n: int, w: int, d: int, seed: int) -> Setting:
        return random_setting(
            kind, activation, loss, examples=n, width=w, depth=d, dtype=dtype, seed=seed,  # type: ignore[arg-type]
        )  # fmt: skip

    return st.builds(
        build, st.sampled_from(kinds), st.sampled_from(activations), st.sampled_from(losses), st.sampled_from(dtypes),
        st.integers(*examples), st.integers(*width), st.integers(*depth), st.integers(0, 2**31),
    )  # fmt: skip
