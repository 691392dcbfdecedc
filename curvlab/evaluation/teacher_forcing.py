"""The share of an answer's tokens that a model predicts when the answer's earlier tokens are given to it.

The measure most of the literature reports. It leaks the answer's length and all but its last token, and so
overestimates what an edited model says by itself (Yang et al. 2025; Table 3 against Table 1 of the paper).
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from curvlab.capture import run, to_device
from curvlab.data.text import IGNORE, PLAIN, encode_pairs
from curvlab.evaluation.mode import evaluating
from curvlab.progress import progress


@torch.no_grad()
def token_match(
    model: PreTrainedModel,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    template: str = PLAIN,
    batch_size: int = 32,
) -> list[float]:
    """For each (prompt, answer) the mean, over the answer's tokens, of argmax prediction = token.

    The end of text is not counted. The model is run in evaluation mode and handed back in the mode it came in.

    Raises:
        ValueError: an answer without a token (see `encode_pairs`).
    """
    if not pairs:
        return []
    # similar lengths together: little padding
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])), reverse=True)
    batches = encode_pairs(tokenizer, [pairs[i] for i in order], template=template, end=False, batch_size=batch_size)
    found: list[float] = []
    with evaluating(model):
        for batch in progress(batches, "teacher forcing"):
            predicted = run(model, to_device(batch.inputs, model.device)).argmax(-1).cpu()
            asked = batch.targets != IGNORE
            hits = (predicted == batch.targets) & asked
            found += (hits.sum(1).double() / asked.sum(1)).tolist()
    return [found[position] for position in sorted(range(len(order)), key=order.__getitem__)]
