"""Real statements (CounterFact, ZsRE) and TinyStories text for the embedded world, from files."""

import random
import re
from dataclasses import replace
from pathlib import Path

from curvlab.data.edits import load_edits
from curvlab.data.world_facts import Fact

SETS = ("counterfact", "zsre")  # named as in curvlab.data.edits
STORIES = "text/tinystories_sample.txt"
RELATIONS = (*SETS, "neighbour")
_SEPARATOR = "<|endoftext|>"
_SENTENCES = re.compile(r".{1,240}[.!?]\"?(?= |$)")  # as many as fit: the embedded models learn from short texts


def real_facts(data: Path, source: str, n: int, seed: int) -> list[Fact]:
    """`n` requests of a named edit set: what is stated of their subject, and (once each) their neighbours.

    Each second fact is stated in both of its phrasings; the others have the second one held out. Real rephrasings
    share little with the prompts, so that few of the held-out ones can be answered. A request without paraphrases
    (`load_edits` leaves contradictory ones out) is stated in its prompt.

    Raises:
        FileNotFoundError: no such file in `data`.
        ValueError: fewer than `n` requests, fields missing, or requests without a truth.
    """
    facts: dict[str, Fact] = {}
    for index, request in enumerate(load_edits(source, n, seed=seed, data=data)):
        if not request.truth:
            raise ValueError(f"{source}: {request.prompt!r} needs a true answer to be part of a world")
        told = (request.prompt, *request.paraphrases[:1])
        train, held_out = (told, ()) if index % 2 else (told[:1], told[1:])
        facts[request.prompt] = Fact(
            request.subject, source, request.truth, train, held_out, request.target, request.neighbours
        )
        for beside, kept in request.neighbours:
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
    path = data.expanduser() / STORIES
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give a data folder that holds it and edits/counterfact.json")
    openings = (
        _SENTENCES.match(" ".join(story.split())) for story in path.read_text(encoding="utf-8").split(_SEPARATOR)
    )
    stories = list(dict.fromkeys(opening[0] for opening in openings if opening))
    if len(stories) < train + held_out:
        raise ValueError(f"{path} has {len(stories)} distinct stories, {train + held_out} are needed")
    random.Random(f"tinystories {seed}").shuffle(stories)
    return stories[held_out : held_out + train], stories[:held_out]
