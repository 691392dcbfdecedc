"""Requests as texts behind a few sampled prefixes, each with the position at which its fact is looked up."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.capture import Batch
from curvlab.data.edits import Request
from curvlab.data.text import IGNORE, encode_documents, encode_pairs, fill, select
from curvlab.editing.subject import named, subject_ends, token_positions
from curvlab.editing.training import Training
from curvlab.layers import device_of

_STARTS = ("The", "Therefore", "Because", "I", "You")  # the authors' beginnings of prefixes
_TOP = 5  # tokens that are drawn from


@dataclass(frozen=True)
class Lookup:
    """Texts "prefix prompt target" of some requests, context by context: the first without a prefix.

    Attributes:
        batch: (contexts · n, T), with the targets' tokens as targets.
        positions: (contexts · n,) of the subject's last token.
        essence: texts "{subject} is a" of the requests `of_essence`, subjects at `essence_positions`; None where no
            request has a subject. Its one target a text is at the last token (whatever comes next).
    """

    n: int
    batch: Batch
    positions: Tensor
    essence: Batch | None
    essence_positions: Tensor
    of_essence: Tensor

    @property
    def contexts(self) -> int:
        return len(self.batch) // self.n

    def of(self, index: Tensor) -> "Lookup":
        """That of the requests `index` (m,)."""
        rows = torch.cat([index + i * self.n for i in range(self.contexts)])
        place = {int(request): i for i, request in enumerate(index)}
        chosen = torch.tensor([i for i, request in enumerate(self.of_essence.tolist()) if request in place]).long()
        essence = select(self.essence, chosen) if self.essence is not None and len(chosen) else None
        of = torch.tensor([place[int(request)] for request in self.of_essence[chosen]]).long()
        return Lookup(
            len(index), select(self.batch, rows), self.positions[rows], essence, self.essence_positions[chosen], of
        )

    def mean(self, values: Tensor) -> Tensor:
        """(contexts · n, …) as (n, …): half the plain prompt's, half the mean over the prefixes (MEMIT's weights)."""
        by_context = values.unflatten(0, (self.contexts, self.n))
        return (by_context[0] + by_context[1:].mean(0)) / 2 if self.contexts > 1 else by_context[0]


def look_up(
    tokenizer: Any, requests: Sequence[Request], prefixes: Sequence[str], options: Training, subject: str, essence: str
) -> Lookup:
    """The texts of `requests`, plain and behind each of `prefixes`.

    Args:
        subject: what to do without one (`subject_ends`).
        essence: the text whose predictions are to stay, with {subject}.

    Raises:
        ValueError: requests without a subject in their prompt, or a subject that the tokenizer drops.
    """
    prompts = [fill(options.template, request.prompt) for request in requests]
    ends = subject_ends(requests, options.template, subject)
    pairs = [
        (prefix + prompt, request.target + options.ending)
        for prefix in ("", *prefixes)
        for prompt, request in zip(prompts, requests, strict=True)
    ]
    (batch,) = encode_pairs(tokenizer, pairs, end=options.end)
    texts = [f"{prompt} {target}" for prompt, target in pairs]
    positions = token_positions(tokenizer, texts, [len(prefix) + end for prefix in ("", *prefixes) for end in ends])
    with_subject = [i for i, request in enumerate(requests) if subject != "ignored" and named(request)]
    if not with_subject:
        return Lookup(len(requests), batch, positions, None, torch.zeros(0).long(), torch.zeros(0).long())
    subjects = [requests[i].subject.strip() for i in with_subject]
    about = [essence.replace("{subject}", text) for text in subjects]
    at = [essence.index("{subject}") + len(text) - 1 for text in subjects]
    (texts_about,) = encode_documents(tokenizer, about, max_length=2**20, batch_size=len(about))
    targets = torch.full_like(texts_about.targets, IGNORE)
    targets[torch.arange(len(about)), texts_about.inputs["attention_mask"].sum(1) - 1] = 0  # what follows the text
    return Lookup(
        len(requests), batch, positions, replace(texts_about, targets=targets),
        token_positions(tokenizer, about, at), torch.tensor(with_subject),
    )  # fmt: skip


@torch.no_grad()
def sample_prefixes(model: nn.Module, tokenizer: Any, n: int, length: int, seed: int) -> list[str]:
    """`n` beginnings of text, each drawn from the model (`length` tokens, of the likeliest five) and ended by ". "."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = []
    for i in range(n):
        start = _STARTS[i % len(_STARTS)]
        tokens = torch.tensor([tokenizer(start)["input_ids"]], device=device_of(model))
        ended = tokens[0, -1].item() == tokenizer.eos_token_id and tokens.shape[1] > 1
        tokens = tokens[:, :-1] if ended else tokens  # some tokenizers end every text themselves
        for _ in range(length):
            logits = model(input_ids=tokens, use_cache=False).logits[0, -1].float().cpu()
            top = logits.topk(min(_TOP, len(logits)))
            drawn = torch.multinomial(top.values.softmax(0), 1, generator=generator)
            tokens = torch.cat([tokens, top.indices[drawn].view(1, 1).to(tokens.device)], 1)
        text = " ".join(tokenizer.decode(tokens[0], skip_special_tokens=True).split())
        prefixes.append(f"{text}. ")
    return prefixes
