"""Edited weights in float32 while the model computes in bfloat16, whose rounding would swallow Adam's small steps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from curvlab.layers import MatrixLayer


@contextmanager
def widened(layer: MatrixLayer) -> Iterator[None]:
    """Inside, the layer's weight is float32, and rounded to the model's own dtype in every forward pass.

    What is trained is thereby the model as it will be: at the end the weight takes its own dtype again. A layer in
    float32 or better stays as it is.
    """
    (weight, *_), module = layer.parameters(), layer.module
    narrow, wide = weight.dtype, torch.promote_types(weight.dtype, torch.float32)
    if narrow == wide:
        yield
        return

    def forward(x: Tensor) -> Tensor:
        bias: Tensor | None = module.bias  # type: ignore[assignment]
        return F.linear(x, layer.matrix(layer.parameters()).to(x.dtype), bias)

    slot = "_old_forward" if hasattr(module, "_hf_hook") else "forward"  # accelerate wraps a forward of its own
    before = vars(module).get(slot)
    weight.grad = None
    weight.data = weight.data.to(wide)
    setattr(module, slot, forward)
    try:
        yield
    finally:
        weight.grad = None
        weight.data = weight.data.to(narrow)
        if before is None:
            delattr(module, slot)
        else:
            setattr(module, slot, before)
