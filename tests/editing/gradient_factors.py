"""Inputs of layers and gradients at their outputs, request by request, from plain hooks."""

from typing import Any

import torch
from requests_and_text import request_texts
from torch import Tensor, nn

from curvlab.data.edits import Request


def watch(name: str, seen: dict[str, tuple[Tensor, Tensor]]) -> Any:
    """A hook that notes a layer's input and keeps the gradient at its output."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        seen[name] = (args[0][0].detach(), output)

    return hook


def gathered(model: nn.Module, names: list[str], requests: list[Request], positions: str) -> dict[str, Any]:
    """(h, v) by layer, request by request without padding, from plain hooks; v of the summed target loss."""
    found: dict[str, Any] = {name: ([], []) for name in names}
    for tokens, targets in request_texts(requests, mask_prompt=True):
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        handles = [model.get_submodule(name).register_forward_hook(watch(name, seen)) for name in names]
        logits = model(input_ids=torch.tensor([tokens])).logits[0]
        for handle in handles:
            handle.remove()
        torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="sum").backward()
        chosen = [i for i, target in enumerate(targets) if positions == "all" or target != -100]
        for name, (h, output) in seen.items():
            assert output.grad is not None
            found[name][0].append(h[chosen])
            found[name][1].append(output.grad[0][chosen])
    model.zero_grad()
    return {name: (torch.cat(h), torch.cat(v)) for name, (h, v) in found.items()}
