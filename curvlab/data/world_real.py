"""Real CounterFact statements and TinyStories text for the embedded world, from files."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

from curvlab.data.world_facts import Fact

COUNTERFACT = "edits/counterfact.json"
STORIES = "text/tinystories_sample.txt"
RELATIONS = ("counterfact", "neighbour")
_SEPARATOR = "<|endoftext|>"
_SENTENCES = re.compile(r".{1,240}[.!?]\"?(?= |$)")  # as many as fit: the embedded models learn from short texts


def real_facts(data: Path, n: int, seed: int) -> list[Fact]:
    """`n` CounterFact requests: what is stated of their subject, and (once each) their neighbours.

    Each second fact is stated in both of its phrasings; the others have the second one held out. Real rephrasings
    share little with the prompts, so that few of the held-out ones can be answered.

    Raises:
        FileNotFoundError: no such file in `data`.
        ValueError: fewer than `n` requests, or not EasyEdit's field names.
    """
    path = _existing(data, COUNTERFACT)
    requests = json.loads(path.read_text(encoding="utf-8"))
    fields = ("prompt", "subject", "ground_truth", "target_new", "rephrase_prompt", "locality_prompt",
              "locality_ground_truth")  # fmt: skip
    if not isinstance(requests, list) or any(field not in request for request in requests for field in fields):
        raise ValueError(f"{path} must be a list of requests with {', '.join(fields)}")
    if len(requests) < n:
        raise ValueError(f"{path} has {len(requests)} requests, {n} are needed")
    facts: dict[str, Fact] = {}
    for index, request in enumerate(random.Random(f"counterfact {seed}").sample(requests, n)):
        prompt, rephrased, beside = (request[key].strip() for key in ("prompt", "rephrase_prompt", "locality_prompt"))
        truth, kept = request["ground_truth"].strip(), request["locality_ground_truth"].strip()
        train, held_out = ((prompt, rephrased), ()) if index % 2 else ((prompt,), (rephrased,))
        facts[prompt] = Fact(
            request["subject"], "counterfact", truth, train, held_out, request["target_new"].strip(), ((beside, kept),)
        )
        # A neighbour has no counterfactual of its own, and is never edited: it is stated, so that it can be kept.
        facts.setdefault(beside, Fact(beside, "neighbour", kept, (beside,), ()))
    stated = {prompt for fact in facts.values() for prompt in fact.train_prompts}
    return [
        replace(fact, held_out_prompts=tuple(p for p in fact.held_out_prompts if p not in stated))
        for fact in facts.values()
    ]


def real_stories(data: Path, train: int, held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """(training texts, held-out texts): the first sentences of as many TinyStories.

    Raises:
        FileNotFoundError: no such file in `data`.
        ValueError: too few stories.
    """
    path = _existing(data, STORIES)
    openings = (
        _SENTENCES.match(" ".join(story.split())) for story in path.read_text(encoding="utf-8").split(_SEPARATOR)
    )
    stories = list(dict.fromkeys(opening[0] for opening in openings if opening))
    if len(stories) < train + held_out:
        raise ValueError(f"{path} has {len(stories)} distinct stories, {train + held_out} are needed")
    random.Random(f"tinystories {seed}").shuffle(stories)
    return stories[held_out : held_out + train], stories[:held_out]


def _existing(data: Path, name: str) -> Path:
    path = data.expanduser() / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give a data folder that holds {COUNTERFACT} and {STORIES}")
    return path
