"""What a step of MEND's training edits, what it asks afterwards, and which text it leaves alone."""

from collections.abc import Sequence

import torch

from curvlab.data.edits import Request


def prompts_of(requests: Sequence[Request]) -> list[str]:
    """Prompts and paraphrases of all requests."""
    return [prompt for request in requests for prompt in (request.prompt, *request.paraphrases)]


def unrelated_texts(requests: Sequence[Request], documents: Sequence[str]) -> list[str]:
    """What edits should leave alone: the requests' neighbours with their answers, and documents of the capability set.

    Where there are neither, the requests' own prompts, each for edits of the others.
    """
    neighbours = [f"{prompt} {answer}" for request in requests for prompt, answer in request.neighbours]
    texts = [*dict.fromkeys(neighbours), *documents]
    return texts or [request.prompt for request in requests]


def related(text: str, request: Request) -> bool:
    """Whether a text is about what a request edits: it holds its subject, or begins as one of its prompts."""
    prompts = (request.prompt, *request.paraphrases)
    return bool(request.subject and request.subject in text) or text.startswith(prompts)


def draw(
    requests: Sequence[Request], unrelated: Sequence[str], group: int, asked: int, *, seed: int, step: int
) -> tuple[list[int], list[tuple[str, str]], list[str]]:
    """Of one step: which requests are edited, what is asked of at most `asked` of them, and as many unrelated texts.

    Asked is a paraphrase or the prompt, with the target; no text is about any of the edited requests.

    Raises:
        ValueError: no text that is not about them.
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    edited = torch.randperm(len(requests), generator=generator)[:group].tolist()
    asked = min(asked, group)
    pairs = []
    for request in (requests[i] for i in edited[:asked]):
        prompts = (request.prompt, *request.paraphrases)
        pairs.append((prompts[below(len(prompts))], request.target))
    texts: list[str] = []
    for _ in range(100 * asked):
        text = unrelated[below(len(unrelated))]
        if not any(related(text, requests[i]) for i in edited):
            texts.append(text)
        if len(texts) == asked:
            return edited, pairs, texts
    if texts:
        return edited, pairs, texts
    raise ValueError(
        "MEND is trained to leave unrelated texts alone, and all that were given are about the edits: give requests "
        "with neighbours, or a capability set"
    )
