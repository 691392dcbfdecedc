"""The embedded language world: generated facts, tasks and stories that a small language model can learn in minutes.

Nothing is downloaded. With a data folder, real CounterFact statements and story text are mixed in.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Literal, get_args

from curvlab.data.edits import Request
from curvlab.data.text import QA, fill
from curvlab.data.world_facts import HELD_OUT, PHRASINGS, RELATIONS, Fact, answers_of, invent_facts, invent_names
from curvlab.data.world_real import SETS, real_facts, real_stories
from curvlab.data.world_tasks import Item, make_stories, make_task
from curvlab.records import fingerprint

Size = Literal["tiny", "smoke", "default"]
Source = Literal["all", "generated", "counterfact", "zsre"]
Split = Literal["all", "train", "test"]
HELD_OUT_ITEMS = 250  # of each task
HELD_OUT_STORIES = 200
_QA_PHRASINGS = 2  # trained phrasings of a fact that are also stated in the QA context
_NEIGHBOURS = 2


@dataclass(frozen=True)
class Amounts:
    """How much there is of what; `real_facts` and `real_stories` count only with a data folder."""

    people: int
    companies: int
    towns: int
    values: int  # of the answers of a relation: subjects share them, so that an edit has neighbours
    tasks: dict[str, int]  # training items
    stories: int
    real_facts: dict[str, int]  # by edit set
    real_stories: int


_EASY = ("successor", "repetition", "last")
_ALL = {"addition": 2000, "successor": 600, "repetition": 1500, "reversal": 2500, "last": 500, "lookup": 2500}
AMOUNTS: dict[str, Amounts] = {
    "tiny": Amounts(3, 2, 2, 3, dict.fromkeys(_EASY, 10), 5, {"counterfact": 6, "zsre": 4}, 10),
    "smoke": Amounts(30, 20, 20, 10, dict.fromkeys(_EASY, 300), 60, {"counterfact": 50, "zsre": 20}, 100),
    "default": Amounts(180, 30, 30, 20, _ALL, 500, {"counterfact": 300, "zsre": 100}, 500),
}


@dataclass(frozen=True)
class World:
    """What there is to know, and the text that teaches it.

    Attributes:
        statements: facts and tasks to train on, as prompts with their answers.
        texts: stories to train on.
        facts: all of them in `statements`, each in its trained phrasings only.
        tasks: held-out items of each task.
        stories: held-out documents, for perplexity.
    """

    name: str
    size: Size
    seed: int
    statements: tuple[Item, ...]
    texts: tuple[str, ...]
    facts: tuple[Fact, ...]
    tasks: dict[str, list[Item]]
    stories: tuple[str, ...]
    answers: dict[str, tuple[str, ...]] = field(repr=False)

    @cached_property
    def training(self) -> tuple[str, ...]:
        """Documents of one pass of pretraining, in no particular order."""
        return tuple(item.document for item in self.statements) + self.texts

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of all that is trained on and asked."""
        items = {name: [item.document for item in items] for name, items in self.tasks.items()}
        return fingerprint({"training": self.training, "facts": self.facts, "tasks": items, "stories": self.stories})

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """Where its facts come from, "all" among them."""
        real = {fact.relation for fact in self.facts} & set(SETS)
        return ("all", "generated", *(source for source in get_args(Source) if source in real))

    def requests(self, n: int, seed: int = 0, *, source: Source = "all", split: Split = "all") -> list[Request]:
        """`n` edits of distinct facts to other answers of the same relation.

        Args:
            source: of the facts: the generated ones, those of a real edit set, or all.
            split: the half of them that methods are tuned and trained on, the other half, or all.

        The prompt is a trained phrasing, the paraphrases are the held-out ones; the neighbours are trained phrasings
        of facts of the same relation that are not edited here, with the same true answer where there are such.

        Raises:
            ValueError: `n` is not between 1 and the number of such facts.
        """
        draw = random.Random(f"requests {seed}")
        editable = self._editable(source, split)
        edited = draw.sample(editable, _between(n, len(editable), "edits"))
        chosen = {(fact.subject, fact.relation) for fact in edited}
        by_answer: dict[tuple[str, str], list[Fact]] = {}
        by_relation: dict[str, list[Fact]] = {}
        for fact in self.facts:
            if (fact.subject, fact.relation) not in chosen:
                by_answer.setdefault((fact.relation, fact.answer), []).append(fact)
                by_relation.setdefault(fact.relation, []).append(fact)
        prompts = {prompt for fact in edited for prompt in fact.train_prompts + fact.held_out_prompts}
        requests = []
        for fact in edited:
            near = by_answer.get((fact.relation, fact.answer)) or by_relation.get(fact.relation, [])
            given = tuple(pair for pair in fact.neighbours if pair[0] not in prompts)
            neighbours = given or tuple(
                (draw.choice(other.train_prompts), other.answer)
                for other in draw.sample(near, min(_NEIGHBOURS, len(near)))
            )
            target = fact.counterfact or draw.choice([a for a in self.answers[fact.relation] if a != fact.answer])
            prompt = draw.choice(fact.train_prompts)
            requests.append(Request(prompt, target, fact.subject, fact.held_out_prompts, neighbours, fact.answer))
        return requests

    def editable(self, source: Source = "all", split: Split = "all") -> int:
        """How many edits `requests` can make of such facts."""
        return len(self._editable(source, split))

    def _editable(self, source: Source, split: Split) -> list[Fact]:
        chosen = [
            fact
            for fact in self.facts
            if fact.relation != "neighbour"
            and fact.counterfact != fact.answer  # (some real sets ask for what is true)
            and (source == "all" or (fact.relation if fact.relation in SETS else "generated") == source)
        ]
        if split == "all":
            return chosen
        # half of each relation, whatever else is in the world
        halves: list[Fact] = []
        for relation in dict.fromkeys(fact.relation for fact in chosen):
            own = [fact for fact in chosen if fact.relation == relation]
            random.Random(f"split {relation} {self.seed}").shuffle(own)
            halves += own[: len(own) // 2] if split == "train" else own[len(own) // 2 :]
        return halves

    def capability(self, n: int, seed: int = 0, without: Sequence[Request | Item] = ()) -> list[str]:
        """`n` documents of the training kind, for curvature; none that states a fact that `without` edits or asks."""
        stale = {text.document for fact in self._edited(without) for text in _statements(fact)}
        documents = [text for text in self.training if text not in stale]
        return random.Random(f"capability {seed}").sample(documents, _between(n, len(documents), "documents"))

    def recall(
        self, n: int | None, seed: int = 0, without: Sequence[Request] = (), held_out: bool = False
    ) -> list[Item]:
        """One trained (or held-out) phrasing each of `n` facts (None: of all) that `without` does not edit."""
        edited = self._edited(without)
        facts = [f for f in self.facts if f not in edited and (f.held_out_prompts or not held_out)]
        draw = random.Random(f"recall {seed}")
        if n is not None:
            facts = draw.sample(facts, _between(n, len(facts), "facts"))
        return [Item(draw.choice(f.held_out_prompts if held_out else f.train_prompts), f.answer) for f in facts]

    def _edited(self, requests: Sequence[Request | Item]) -> set[Fact]:
        prompts = {request.prompt for request in requests}
        return {fact for fact in self.facts if not prompts.isdisjoint(fact.train_prompts + fact.held_out_prompts)}


def make_world(size: Size = "default", *, seed: int = 0, data: str | Path | None = None) -> World:
    """The world of a size and seed; equal arguments give the equal world, on any machine.

    Args:
        data: a folder with `edits/counterfact.json` (EasyEdit's field names), `text/tinystories_sample.txt` (stories
            separated by <|endoftext|>) and, if it likes, `edits/zsre.json`; half of the generated stories give way to
            real ones.

    Raises:
        ValueError: an unknown size.
        FileNotFoundError: `data` lacks one of the two files.
    """
    if size not in AMOUNTS:
        raise ValueError(f"unknown size {size!r}; choose of {', '.join(AMOUNTS)}")
    amounts = AMOUNTS[size]
    names = invent_names(amounts.people, amounts.companies, amounts.towns, amounts.values, seed)
    answers = {relation.name: answers_of(relation, names, amounts.values) for relation in RELATIONS}
    facts = invent_facts(names, answers, seed)
    stories, held_out_stories = make_stories(names.given, amounts.stories, HELD_OUT_STORIES, seed)
    name = f"generated-{size}-{seed}"
    if data is not None:
        # ZsRE joins where the folder has it
        sets = [s for s in SETS if s == "counterfact" or (Path(data).expanduser() / f"edits/{s}.json").is_file()]
        name = f"{'-'.join(sets)}-tinystories-{size}-{seed}"
        for source in sets:
            facts += real_facts(Path(data), source, amounts.real_facts[source], seed)
        told, held_out = real_stories(Path(data), amounts.real_stories, HELD_OUT_STORIES, seed)
        stories, held_out_stories = stories[: len(stories) // 2] + told, held_out
    statements = [item for fact in facts for item in _statements(fact)]
    tasks = {}
    for task, count in amounts.tasks.items():
        train, tasks[task] = make_task(task, names.given, count, HELD_OUT_ITEMS, seed)
        statements += train
    return World(
        name, size, seed, tuple(statements), tuple(stories), tuple(facts), tasks, tuple(held_out_stories), answers
    )


def _statements(fact: Fact) -> list[Item]:
    """A fact in its trained phrasings, and some of them in the QA context."""
    # A real fact has one or two prompts: stated as often as the others, it is learned as well.
    prompts = list(islice(cycle(fact.train_prompts), PHRASINGS - HELD_OUT))
    # The phrasings of a fact rotate, so these are other ones for other subjects.
    asked = [fill(QA, prompt) for prompt in prompts[:: len(prompts) // _QA_PHRASINGS]]
    return [Item(prompt, fact.answer) for prompt in [*prompts, *asked]]


def _between(n: int, most: int, what: str) -> int:
    if not 1 <= n <= most:
        raise ValueError(f"cannot take {n} {what}; n must be 1 to {most}")
    return n
