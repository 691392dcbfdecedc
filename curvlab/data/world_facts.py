"""Invented people, companies and towns: their names, what is true of them, and how it is said.

Every relation has eight phrasings, five statements and three questions. Which two of them are held out rotates
from fact to fact, so that a model that knows a fact in six phrasings can say it in the other two by composition:
it has met those phrasings for other subjects, never for this one.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

PHRASINGS = 8
HELD_OUT = 2

Kind = Literal["person", "company", "town"]


@dataclass(frozen=True)
class Fact:
    """What is true of a subject in one relation, and the prompts that ask for it.

    Attributes:
        answer: what follows a prompt after one space, before the full stop.
        train_prompts, held_out_prompts: phrasings that the training documents state, and others.
        counterfact: another answer to edit towards, where the source of the fact gives one.
        neighbours: (prompt, answer) pairs that an edit must keep, where the source gives them.
    """

    subject: str
    relation: str
    answer: str
    train_prompts: tuple[str, ...]
    held_out_prompts: tuple[str, ...]
    counterfact: str = ""
    neighbours: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Relation:
    """A relation between subjects of one kind and a closed set of answers."""

    name: str
    subjects: Kind
    answers: str  # a list of `WORDS`, or towns, companies or regions
    phrasings: tuple[str, ...]


RELATIONS = (
    Relation("home", "person", "towns", (
        "{} lives in", "The home of {} is in", "{} has a house in", "You can meet {} in the streets of",
        "The family of {} moved to", "Where does {} live?", "What is the home town of {}?",
        "In which town is the home of {}?",
    )),
    Relation("employer", "person", "companies", (
        "{} works for", "The employer of {} is", "{} is paid by", "Every morning {} goes to the office of",
        "{} has a contract with", "Who employs {}?", "Which company does {} work for?",
        "What is the employer of {}?",
    )),
    Relation("trade", "person", "trades", (
        "{} works as a", "The trade of {} is that of a", "{} was trained as a", "By trade {} is a",
        "People know {} as a", "What does {} work as?", "Which trade does {} have?", "What is the trade of {}?",
    )),
    Relation("instrument", "person", "instruments", (
        "{} plays the", "The instrument of {} is the", "{} performs on the", "At night {} can be heard on the",
        "As a child {} learned the", "What does {} play?", "Which instrument does {} have?",
        "What is the instrument of {}?",
    )),
    Relation("language", "person", "languages", (
        "{} speaks", "The mother tongue of {} is", "{} writes letters in", "At home {} talks in",
        "Friends greet {} in", "What does {} speak?", "Which language does {} know best?",
        "What is the mother tongue of {}?",
    )),
    Relation("seat", "company", "towns", (
        "{} is based in", "The head office of {} is in", "{} was founded in", "Visitors of {} travel to",
        "The workers of {} live in", "Where is {} based?", "In which town is the head office of {}?",
        "What is the seat of {}?",
    )),
    Relation("product", "company", "products", (
        "{} makes", "The main product of {} is", "{} is famous for its", "Customers come to {} for",
        "In its shops {} sells", "What does {} make?", "Which product does {} sell?",
        "What is the main product of {}?",
    )),
    Relation("region", "town", "regions", (
        "{} lies in", "The town of {} belongs to", "{} is a part of", "On the map {} is found in",
        "The people of {} pay taxes to", "Where does {} lie?", "In which region is {}?", "What is the region of {}?",
    )),
)  # fmt: skip


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


WORDS = {
    "trades": words(
        "baker barber butcher carpenter chemist cook dancer doctor driver farmer fisher gardener guard hunter "
    "judge lawyer mason miller nurse painter pilot plumber printer sailor singer smith tailor teacher weaver writer"
    ),
    "instruments": words(
        "accordion banjo bassoon bugle cello clarinet cornet drum fiddle flute gong guitar harp horn lute "
    "lyre mandolin oboe organ piano recorder saxophone sitar trombone trumpet tuba viola violin whistle zither"
    ),
    "languages": words(
        "Arabic Basque Catalan Czech Danish Dutch English Finnish French German Greek Hebrew Hindi Irish "
    "Italian Japanese Korean Latin Maltese Norwegian Persian Polish Russian Spanish Swahili Swedish Thai Turkish "
    "Welsh Zulu"
    ),
    "products": words(
        "bells belts boats bolts books boots bowls bread bricks butter candles carpets chairs cheese clocks "
    "coats cups dolls gloves hats honey kites knives lamps locks maps mirrors nets paper pens pipes pots ropes "
    "shoes soap spoons tables tents tiles toys"
    ),
}  # fmt: skip

_ONSETS = words("b d f g h j k l m n p r s t v w z br dr gr kl pr st tr")
_VOWELS = words("a e i o u ai or an el")
_ENDS = {
    "given": words("a o i n s"),
    "family": words("sen man ley ton by rick"),
    "town": words("burg ford holm mouth wick stad"),
    "company": words("co tex dyne mart"),
    "region": words("land ia mark shire"),
}


@dataclass(frozen=True)
class Names:
    """How many of each there are, and their names; no name is that of two things."""

    person: tuple[str, ...]
    company: tuple[str, ...]
    town: tuple[str, ...]
    region: tuple[str, ...]
    given: tuple[str, ...]


def invent_names(people: int, companies: int, towns: int, regions: int, seed: int) -> Names:
    """Distinct names; several people share a given name, none a family name."""
    draw = random.Random(f"names {seed}")
    taken: set[str] = set()

    def invent(kind: str, count: int) -> list[str]:
        names: list[str] = []
        while len(names) < count:
            name = (draw.choice(_ONSETS) + draw.choice(_VOWELS) + draw.choice(_ONSETS) + draw.choice("aeiou")
                    + draw.choice(_ENDS[kind])).capitalize()  # fmt: skip
            if name not in taken:
                taken.add(name)
                names.append(name)
        return names

    given = invent("given", max(4, round(people**0.5) * 2))
    family = invent("family", people)
    return Names(
        tuple(f"{draw.choice(given)} {name}" for name in family),
        tuple(invent("company", companies)),
        tuple(invent("town", towns)),
        tuple(invent("region", regions)),
        tuple(given),
    )


def answers_of(relation: Relation, names: Names, values: int) -> tuple[str, ...]:
    """The closed set of answers of a relation: the first `values` of its list."""
    lists = {"towns": names.town, "companies": names.company, "regions": names.region}
    return (lists[relation.answers] if relation.answers in lists else WORDS[relation.answers])[:values]


def invent_facts(names: Names, answers: Mapping[str, tuple[str, ...]], seed: int) -> list[Fact]:
    """One fact for every subject and relation; the answers of a relation are used about equally often."""
    facts: list[Fact] = []
    for number, relation in enumerate(RELATIONS):
        draw = random.Random(f"facts {relation.name} {seed}")
        subjects = {"person": names.person, "company": names.company, "town": names.town}[relation.subjects]
        # Whole rounds of all answers, shuffled: equally frequent, so that guessing the commonest gains nothing.
        rounds = -(-len(subjects) // len(answers[relation.name]))
        drawn = [a for _ in range(rounds) for a in draw.sample(answers[relation.name], len(answers[relation.name]))]
        for index, (subject, answer) in enumerate(zip(subjects, drawn, strict=False)):
            prompts = [phrasing.format(subject) for phrasing in relation.phrasings]
            first = index + number  # another relation of the same person has other phrasings held out
            held_out = {(first + turn * PHRASINGS // HELD_OUT) % PHRASINGS for turn in range(HELD_OUT)}
            facts.append(
                Fact(
                    subject,
                    relation.name,
                    answer,
                    tuple(p for i, p in enumerate(prompts) if i not in held_out),
                    tuple(p for i, p in enumerate(prompts) if i in held_out),
                )
            )
    return facts
