"""Small tasks whose held-out items were never trained on, and stories from a small grammar.

A task is a stream of (prompt, answer) items; what is held out is drawn first, and training items are those of the
rest of the stream that differ from it.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from curvlab.data.world_facts import words


@dataclass(frozen=True)
class Item:
    """A prompt and its answer, which follows after one space and is followed by a full stop."""

    prompt: str
    answer: str

    @property
    def document(self) -> str:
        return f"{self.prompt} {self.answer}."


_LETTERS = words("b c d f g h j k l m n p r s t v")
_THINGS = words(
    "apple ball bell book box brush candle coin cup doll drum feather fork hat key kite lamp leaf map mask "
    "needle nut pearl pen pin plate ring rope shell shoe spoon stone"
)
_PLACES = words("attic barn cave cellar church garden hall hut kitchen market mill office park shed stable tower")


def addition(draw: random.Random, names: tuple[str, ...]) -> Item:
    a, b = draw.randrange(100, 995), draw.randint(1, 5)
    return Item(f"{a} + {b} =", str(a + b))


def reversal(draw: random.Random, names: tuple[str, ...]) -> Item:
    letters = draw.sample(_LETTERS, draw.randint(3, 4))
    return Item(f"Reverse {' '.join(letters)} :", " ".join(reversed(letters)))


def repetition(draw: random.Random, names: tuple[str, ...]) -> Item:
    letters = draw.sample(_LETTERS, draw.randint(3, 4))
    return Item(f"Repeat {' '.join(letters)} :", " ".join(letters))


def last(draw: random.Random, names: tuple[str, ...]) -> Item:
    things = draw.sample(_THINGS, draw.randint(2, 4))
    return Item(f"The last of {', '.join(things)} is", things[-1])


def successor(draw: random.Random, names: tuple[str, ...]) -> Item:
    number = draw.randrange(100, 999)
    return Item(f"After {number} comes", str(number + 1))


def lookup(draw: random.Random, names: tuple[str, ...]) -> Item:
    people, things = draw.sample(names, 3), draw.sample(_THINGS, 3)
    pairs = ", ".join(f"{person} {thing}" for person, thing in zip(people, things, strict=True))
    asked = draw.randrange(len(people))
    return Item(f"Given {pairs} : {people[asked]}", things[asked])


Maker = Callable[[random.Random, tuple[str, ...]], Item]
TASKS: dict[str, Maker] = {
    "addition": addition,
    "successor": successor,
    "repetition": repetition,
    "last": last,
    "reversal": reversal,
    "lookup": lookup,
}


def make_task(name: str, names: tuple[str, ...], train: int, held_out: int, seed: int) -> tuple[list[Item], list[Item]]:
    """(training items, held-out items) of a task, all distinct.

    Raises:
        ValueError: an unknown task, or more distinct items than the task has.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; choose of {sorted(TASKS)}")
    draw = random.Random(f"task {name} {seed}")
    items: dict[str, Item] = {}
    for _ in range(100 * (train + held_out)):  # enough to meet all of a thousand distinct items
        item = TASKS[name](draw, names)
        items.setdefault(item.prompt, item)
        if len(items) == train + held_out:
            distinct = list(items.values())
            return distinct[held_out:], distinct[:held_out]
    raise ValueError(f"task {name!r} has not {train + held_out} distinct items with {len(names)} names")


_ANIMALS = words(
    "bear bird cat crow deer dog donkey duck fox frog goat goose hen horse mouse owl pig rabbit sheep wolf"
)
_FEELINGS = words("angry brave calm glad happy hungry proud quiet sad scared shy sleepy tired wild worried")
_ADJECTIVES = words(
    "big black bright brown cold dark green grey little old red round small soft tall white yellow young"
)


def make_story(draw: random.Random, names: tuple[str, ...]) -> str:
    """A short story: who, where, what was lost or found, who helped and how it ended."""
    who, friend = draw.sample(names, 2)
    animal, thing, place, other = draw.choice(_ANIMALS), draw.choice(_THINGS), *draw.sample(_PLACES, 2)
    look, look2, feeling, feeling2 = *draw.sample(_ADJECTIVES, 2), *draw.sample(_FEELINGS, 2)
    opening = draw.choice((
        f"One day {who} found a {look} {thing} in the {place}.",
        f"Once there was a {look} {animal} who lived in the {place} with {who}.",
        f"It was a {look} morning and {who} walked to the {place}.",
    ))  # fmt: skip
    middle = draw.choice((
        f"There {who} met a {look2} {animal}. The {animal} was {feeling} because it had lost its {thing}.",
        f"A {look2} {animal} came and took the {thing}. This made {who} very {feeling}.",
        f'"Why are you so {feeling}?" asked the {look2} {animal}. "I lost my {thing}," said {who}.',
    ))  # fmt: skip
    turn = draw.choice((
        f"Then {friend} came and looked in the {other}. The {thing} was there!",
        f'"Let us ask {friend}," said {who}. They went to the {other} and {friend} gave them the {thing}.',
        f"So {friend} and {who} went to the {other} and found the {thing} under a {look2} stone.",
    ))  # fmt: skip
    ending = draw.choice((
        f"The {animal} was {feeling2} and they all went home.",
        f"{who} thanked {friend} and was {feeling2} again.",
        f"From that day on {who}, {friend} and the {animal} were friends.",
    ))  # fmt: skip
    return f"{opening} {middle} {turn} {ending}"


def make_stories(names: tuple[str, ...], train: int, held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """(training stories, held-out stories), all distinct."""
    draw = random.Random(f"stories {seed}")
    stories: dict[str, None] = {}
    while len(stories) < train + held_out:
        stories[make_story(draw, names)] = None
    distinct = list(stories)
    return distinct[held_out:], distinct[:held_out]
