"""The embedded world: what is held out was never stated, tasks are right, edits and neighbours are what they say."""

import json
import re
from pathlib import Path

import pytest

from curvlab.data.text import QA, fill
from curvlab.data.world import AMOUNTS, World, make_world
from curvlab.data.world_facts import RELATIONS
from curvlab.data.world_tasks import TASKS, make_task


@pytest.fixture(scope="module")
def world() -> World:
    return make_world("smoke")


@pytest.fixture(scope="module")
def default() -> World:
    return make_world("default")


def test_equal_arguments_give_the_equal_world_and_others_another(world: World) -> None:
    assert make_world("smoke") == world
    assert make_world("smoke").fingerprint == world.fingerprint
    other = make_world("smoke", seed=1)
    assert other.fingerprint != world.fingerprint
    assert {f.subject for f in other.facts} != {f.subject for f in world.facts}


def test_a_held_out_phrasing_of_a_fact_is_nowhere_in_the_training_text(default: World) -> None:
    text = "\n".join(default.training)
    for fact in default.facts:
        assert len(fact.train_prompts) == 6
        assert len(fact.held_out_prompts) == 2
        assert not any(prompt in text for prompt in fact.held_out_prompts)


def test_every_fact_is_stated_truly_and_in_the_qa_context(default: World) -> None:
    documents = set(default.training)
    for fact in default.facts:
        assert all(f"{prompt} {fact.answer}." in documents for prompt in fact.train_prompts)
        assert sum(f"{fill(QA, prompt)} {fact.answer}." in documents for prompt in fact.train_prompts) == 2


def test_every_phrasing_is_trained_for_some_subjects_and_held_out_for_others(default: World) -> None:
    """Otherwise a held-out prompt would hold words of unknown meaning, and nothing could be composed."""
    for relation in RELATIONS:
        facts = [fact for fact in default.facts if fact.relation == relation.name]
        for phrasing in relation.phrasings:
            held_out = sum(phrasing.format(fact.subject) in fact.held_out_prompts for fact in facts)
            assert 0.2 < held_out / len(facts) < 0.3


def test_no_name_means_two_things_and_no_fact_is_contradicted(default: World) -> None:
    assert len({(f.subject, f.relation) for f in default.facts}) == len(default.facts)
    stated = [(item.prompt, item.answer) for item in default.statements]
    assert len({prompt for prompt, _ in stated}) == len(set(stated))


def test_answers_come_from_closed_sets_that_subjects_share_evenly(default: World) -> None:
    for relation in RELATIONS:
        answers = [fact.answer for fact in default.facts if fact.relation == relation.name]
        counts = [answers.count(answer) for answer in default.answers[relation.name]]
        assert set(answers) <= set(default.answers[relation.name])
        assert len(counts) == 20
        assert max(counts) - min(counts) <= 1


_NUMBERS = re.compile(r"\d+")


def _solve(task: str, prompt: str) -> str:
    """The answer, read from the prompt's words alone."""
    numbers = [int(number) for number in _NUMBERS.findall(prompt)]
    if task == "addition":
        return str(sum(numbers))
    if task == "successor":
        return str(numbers[0] + 1)
    if task in ("repetition", "reversal"):
        letters = prompt.split()[1:-1]
        return " ".join(letters if task == "repetition" else letters[::-1])
    if task == "last":
        return prompt.removesuffix(" is").split()[-1]
    if task == "lookup":
        pairs, asked = prompt.removeprefix("Given ").split(" : ")
        return dict(pair.split() for pair in pairs.split(", "))[asked]
    raise AssertionError(task)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_task_items_are_right_distinct_and_held_out(task: str) -> None:
    train, held_out = make_task(task, ("Ada", "Ben", "Cleo", "Dan", "Eve", "Fay", "Gus", "Ida"), 600, 250, seed=3)
    assert len({item.prompt for item in train + held_out}) == 850
    assert len(held_out) == 250
    for item in train + held_out:
        assert item.answer == _solve(task, item.prompt)


@pytest.mark.parametrize("size", sorted(AMOUNTS))
def test_held_out_items_and_stories_are_not_trained_on(size: str) -> None:
    world = make_world(size)  # type: ignore[arg-type]
    training = set(world.training)
    trained_prompts = {item.prompt for item in world.statements}
    assert len(world.tasks) >= 3
    for items in world.tasks.values():
        assert len(items) >= 200
        assert trained_prompts.isdisjoint(item.prompt for item in items)
    assert len(world.stories) >= 200
    assert training.isdisjoint(world.stories)


def test_an_edit_asks_for_another_answer_and_names_what_must_stay(default: World) -> None:
    requests = default.requests(300, seed=5)
    by_prompt = {prompt: f for f in default.facts for prompt in f.train_prompts + f.held_out_prompts}
    edited = {(by_prompt[r.prompt].subject, by_prompt[r.prompt].relation) for r in requests}
    assert len(edited) == 300
    same_answer = pairs = 0
    for request in requests:
        fact = by_prompt[request.prompt]
        assert request.prompt in fact.train_prompts
        assert request.truth == fact.answer != request.target
        assert request.target in default.answers[fact.relation]
        assert request.paraphrases == fact.held_out_prompts
        assert 1 <= len(request.neighbours) <= 2
        for prompt, answer in request.neighbours:
            other = by_prompt[prompt]
            assert other.answer == answer
            assert other.relation == fact.relation
            assert (other.subject, other.relation) not in edited
            same_answer += answer == fact.answer
            pairs += 1
    assert pairs > 550
    assert same_answer > 0.85 * pairs  # towns and companies are few, so that some answers have no second subject
    assert default.requests(300, seed=5) == requests != default.requests(300, seed=6)


def test_recall_and_capability_leave_edited_facts_out(world: World) -> None:
    requests = world.requests(100, seed=1)
    edited = [f for f in world.facts if any(r.prompt in f.train_prompts for r in requests)]
    assert len(edited) == 100
    items = world.recall(None, without=requests)
    assert len(items) == len(world.facts) - 100
    old = {prompt for fact in edited for prompt in fact.train_prompts}
    assert old.isdisjoint(item.prompt for item in items)
    held_out = {prompt for fact in world.facts for prompt in fact.held_out_prompts}
    assert {item.prompt for item in world.recall(None, held_out=True)} <= held_out
    kept = len(world.training) - 8 * 100  # six phrasings of each fact, two of them also in the QA context
    documents = world.capability(kept, without=requests)
    assert len(set(documents)) == kept
    with pytest.raises(ValueError, match=f"cannot take {kept + 1} documents; n must be 1 to {kept}"):
        world.capability(kept + 1, without=requests)
    assert set(world.capability(50)) <= set(world.training)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fields = ("prompt", "subject", "ground_truth", "target_new", "rephrase_prompt", "locality_prompt",
              "locality_ground_truth")  # fmt: skip
    requests = [
        dict(zip(fields, (f"The capital of L{i} is", f"L{i}", f"C{i % 5}", f"C{(i + 1) % 5}", f"L{i}'s capital is",
                          f"The capital of M{i % 7} is", f"D{i % 7}"), strict=True))
        for i in range(60)
    ]  # fmt: skip
    (tmp_path / "edits").mkdir()
    (tmp_path / "edits/counterfact.json").write_text(json.dumps(requests))
    (tmp_path / "text").mkdir()
    stories = [f"Once there was a number {i}. It was small." for i in range(300)]
    (tmp_path / "text/tinystories_sample.txt").write_text(
        "\n<|endoftext|>\n".join([*stories, "a last one that is cut"])
    )
    return tmp_path


def test_a_data_folder_mixes_real_facts_and_stories_in(folder: Path, world: World) -> None:
    real = make_world("smoke", data=folder)
    assert real.fingerprint != world.fingerprint
    assert real.name == "counterfact-tinystories-smoke-0"
    facts = [f for f in real.facts if f.relation == "counterfact"]
    assert len(facts) == AMOUNTS["smoke"].real_facts["counterfact"]
    documents = set(real.training)
    assert all(f"{prompt} {f.answer}." in documents for f in facts for prompt in f.train_prompts)
    assert not any(prompt in text for f in facts for prompt in f.held_out_prompts for text in documents)
    assert sum(bool(f.held_out_prompts) for f in facts) == len(facts) // 2
    assert all("Once there was a number" in story for story in real.stories)
    assert all(story.endswith(".") for story in real.stories)
    requests = [r for r in real.requests(200) if r.subject in {f.subject for f in facts}]
    number = {f.subject: int(f.subject[1:]) for f in facts}
    edited = {r.prompt for r in requests}
    assert len(requests) > 10
    for request in requests:
        i = number[request.subject]
        assert request.target == f"C{(i + 1) % 5}"
        assert request.neighbours == ((f"The capital of M{i % 7} is", f"D{i % 7}"),)
        assert edited.isdisjoint(prompt for prompt, _ in request.neighbours)


def test_bad_arguments_say_what_is_right(folder: Path, tmp_path: Path, world: World) -> None:
    with pytest.raises(ValueError, match="unknown size 'huge'; choose of tiny, smoke, default"):
        make_world("huge")  # type: ignore[arg-type]
    (folder / "text/tinystories_sample.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"tinystories_sample.txt is missing; give a data folder"):
        make_world("smoke", data=folder)
    (folder / "edits/counterfact.json").write_text('[{"prompt": "x"}]')
    with pytest.raises(ValueError, match=r"counterfact.json, record 0: field 'target_new' is missing"):
        make_world("smoke", data=folder)
    with pytest.raises(ValueError, match="cannot take 0 edits; n must be 1 to 210"):
        world.requests(0)
    with pytest.raises(ValueError, match="task 'successor' has not 1100 distinct items"):
        make_task("successor", (), 1000, 100, seed=0)
    with pytest.raises(ValueError, match="unknown task 'chess'"):
        make_task("chess", (), 10, 10, seed=0)
