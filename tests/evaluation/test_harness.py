"""lm-evaluation-harness on local files, without a network, against log-likelihoods of our own in float64."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language import tiny_llama, tiny_tokenizer
from torch.nn import functional as F
from transformers import PreTrainedModel

from curvlab.evaluation import harness
from curvlab.evaluation.harness import PAPER, Score, base_capabilities
from curvlab.evaluation.intervals import bootstrap
from curvlab.evaluation.local_benchmarks import write_tasks

pytest.importorskip("lm_eval")

ARC = [
    ("Which is a colour?", ["red", "seven"], 0),
    ("Which animal says miaow?", ["a dog", "a cat", "the tall green heron"], 1),
    ("Which of these is larger than a house?", ["a mountain range", "an ant", "a spoon", "a shoe"], 0),
    ("Where is Paris?", ["in Spain", "in France"], 1),
    *((f"What is {i} plus one?", [str(i), str(i + 1)], 1) for i in range(8)),
]
# answers of about equally many tokens: each has a share of the probability
TRUTHFUL = """\
Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source
Adversarial,Health,"What happens if you eat seeds, whole?",Nix,Nix; Nil,Oak;Elm; ,x
Adversarial,Space,Is the Moon cheese?,No,No; Oh,Ay,x
Adversarial,Space,Is Mars green?,No,No,"Ay; U, V",x
Adversarial,Law,Are cats citizens?,Nay,Nay; Not,Yes; Yea,x
Adversarial,Law,Is water dry?,No,No,Yes,x
"""
TRUTHFUL_ANSWERS = [
    (["Nix", "Nil"], ["Oak", "Elm"]),
    (["No", "Oh"], ["Ay"]),
    (["No"], ["Ay", "U, V"]),
    (["Nay", "Not"], ["Yes", "Yea"]),
]


def instruction(question: str, options: list[str], right: int) -> dict[str, str]:
    text = " ".join(f"Answer{i}: {option}" for i, option in enumerate(options, 1))
    asked = f"Please choose the correct answer to the question: {question}\n\n{text}\n\nAnswer format: answer1/answer2"
    return {"instruction": asked, "answer": f"answer{right + 1}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("benchmarks")
    (data / "arc_challenge_12.json").write_text(json.dumps([instruction(*question) for question in ARC]))
    problems = [{"question": f"I had {i} and got 1. How many?", "answer": f"{i} + 1\n#### {i + 1}"} for i in range(6)]
    (data / "gsm8k_6.jsonl").write_text("\n".join(map(json.dumps, problems)))
    (data / "truthfulqa.csv").write_text(TRUTHFUL)
    rules = [
        ["punctuation:no_comma"],
        ["punctuation:no_comma"],
        ["punctuation:no_comma", "length_constraints:number_words"],
    ]
    options = [[{}], [{}], [{}, {"relation": "at least", "num_words": 5}]]
    tasks = [
        {"key": i, "prompt": "Say something.", "instruction_id_list": of_one, "kwargs": options[i]}
        for i, of_one in enumerate(rules)
    ]
    (data / "ifeval.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    return data


def long_llama() -> PreTrainedModel:
    """Room for the harness' prompts (nothing in a Llama but this number depends on it), and no strong opinions."""
    model = tiny_llama(0, dtype=torch.float64)
    model.lm_head.weight.data *= 0.1
    model.config.max_position_embeddings = 4096
    return model


@pytest.fixture(scope="module")
def scores(folder: Path) -> dict[str, Score]:
    """Without shots, whose draw is the harness' own; GSM8K with its fixed ones, cut to a short context."""
    brief = tiny_llama(0)
    brief.config.max_position_embeddings = 128
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        names = ["arc_challenge", "truthfulqa"]
        found = base_capabilities(long_llama(), tiny_tokenizer(), names, limit=4, shots=0, data=folder, batch_size=3)
        return found | base_capabilities(brief, tiny_tokenizer(), ["gsm8k"], limit=4, data=folder, batch_size=4)


def log_likelihood(prompt: str, continuation: str) -> float:
    model, tokenizer = long_llama(), tiny_tokenizer()
    start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(prompt + continuation)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    return -float(F.cross_entropy(logits[start - 1 : -1], torch.tensor(ids[start:]), reduction="sum"))


def test_arc(scores: dict[str, Score]) -> None:
    """Right where the right option has the best log-likelihood a byte."""
    expected = []
    for question, options, right in ARC[:4]:
        prompt = f"Question: {question}\nAnswer:"
        each = [log_likelihood(prompt, f" {option}") / len(option) for option in options]
        expected.append(float(int(np.argmax(each)) == right))
    assert scores["arc_challenge"].values == expected
    assert scores["arc_challenge"].measures["acc_norm,none"] == pytest.approx(np.mean(expected))
    assert scores["arc_challenge"].interval == bootstrap(expected)
    assert 0 < sum(expected) < 4


def test_truthfulqa(scores: dict[str, Score]) -> None:
    """The share of probability on the right answers, after the harness' six fixed examples."""
    import lm_eval.tasks
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads past the harness' !function."""

    Loader.add_constructor("!function", lambda *_: None)
    file = Path(lm_eval.tasks.__file__).parent / "truthfulqa" / "truthfulqa_mc1.yaml"
    text = yaml.load(file.read_text(), Loader)["doc_to_text"]
    head = text[text.index("Q:") : text.index("'%}")].replace("\\n", "\n")
    expected = []
    questions = ["What happens if you eat seeds, whole?", "Is the Moon cheese?", "Is Mars green?", "Are cats citizens?"]
    for question, (right, wrong) in zip(questions, TRUTHFUL_ANSWERS, strict=True):
        prompt = f"{head}\n\nQ: {question}\nA:"
        p = np.exp([log_likelihood(prompt, f" {answer}") for answer in right + wrong])
        expected.append(float(p[: len(right)].sum() / p.sum()))
        assert np.sort(p)[-2] > 0.01 * p.max()  # more than one answer matters
    assert scores["truthfulqa"].values == pytest.approx(expected, rel=1e-6)
    assert scores["truthfulqa"].interval == bootstrap(scores["truthfulqa"].values)


def test_gsm8k_by_generation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that says one sentence whatever it is asked is right where that is the answer."""
    from lm_eval.models.huggingface import HFLM

    asked: list[str] = []

    def say(_: Any, requests: list[Any], **__: Any) -> list[str]:
        asked.extend(request.args[0] for request in requests)
        return ["It is 2 + 1 = 3. The answer is 3."] * len(requests)

    monkeypatch.setattr(HFLM, "generate_until", say)
    found = base_capabilities(tiny_llama(), tiny_tokenizer(), ["gsm8k"], limit=4, data=folder)["gsm8k"]
    assert found.values == [0, 0, 1, 0]
    assert found.measures == {"exact_match,strict-match": 0.25, "exact_match,flexible-extract": 0.25}
    assert all(prompt.count("Q:") == PAPER["gsm8k"].shots + 1 for prompt in asked)
    assert asked[2].endswith("Q: I had 2 and got 1. How many?\nA:")


def test_ifeval(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("langdetect")
    pytest.importorskip("immutabledict")
    pytest.importorskip("nltk")
    from lm_eval.models.huggingface import HFLM

    limits = []

    def say(_: Any, requests: list[Any], **__: Any) -> list[str]:
        limits.extend(request.args[1]["max_gen_toks"] for request in requests)
        return ["No commas here", "One, two", "Short"]

    monkeypatch.setattr(HFLM, "generate_until", say)
    found = base_capabilities(tiny_llama(), tiny_tokenizer(), ["ifeval"], data=folder)["ifeval"]
    assert found.values == [1, 0, 0]
    assert found.measures["inst_level_strict_acc,none"] == pytest.approx(2 / 4)
    assert limits == [256] * 3  # half of this model's context, not the 1280 of the harness


def test_a_random_model_knows_nothing(scores: dict[str, Score]) -> None:
    assert scores["gsm8k"].values == [0] * 4
    assert scores["gsm8k"].interval.high == pytest.approx(1 - 0.025**0.25)
    assert all(len(score.values) == 4 for score in scores.values())


def test_shots_come_from_the_end_of_arc(folder: Path, tmp_path: Path) -> None:
    assert write_tasks(folder, tmp_path, ["arc_challenge"]) == {"arc_challenge": "arc_challenge_local"}
    splits = {}
    for split in ("test", "train"):
        lines = (tmp_path / f"arc_challenge_{split}.jsonl").read_text().splitlines()
        splits[split] = [json.loads(line) for line in lines]
    assert [record["question"] for record in splits["test"] + splits["train"]] == [question for question, *_ in ARC]
    assert len(splits["train"]) == 6
    assert splits["test"][1] == {
        "question": "Which animal says miaow?",
        "choices": {"text": ["a dog", "a cat", "the tall green heron"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    }


def test_paper_settings() -> None:
    shots = {name: benchmark.shots for name, benchmark in PAPER.items()}
    assert shots == {"mmlu": 5, "ifeval": 0, "truthfulqa": 0, "arc_challenge": 25, "gsm8k": 8}


def test_nothing_global_changes(folder: Path) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    tokenizer.pad_token = None
    model.train()
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    base_capabilities(model, tokenizer, ["arc_challenge"], limit=1, shots=2, data=folder)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    assert tokenizer.pad_token is None
    assert model.training


def test_refusals(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    with pytest.raises(ValueError, match=r"unknown benchmarks \['mmmu'\]; choose among mmlu, ifeval"):
        base_capabilities(model, tokenizer, ["mmmu"])
    with pytest.raises(ValueError, match="'mmlu' cannot be read from local files"):
        base_capabilities(model, tokenizer, ["mmlu"], data=folder)
    with pytest.raises(FileNotFoundError, match=r"no gsm8k\*\.jsonl in"):
        base_capabilities(model, tokenizer, ["gsm8k"], data=tmp_path)
    shutil.copy(folder / "gsm8k_6.jsonl", tmp_path / "arc_challenge.json")
    with pytest.raises(ValueError, match=r"arc_challenge\.json is no file of 'arc_challenge'"):
        base_capabilities(model, tokenizer, ["arc_challenge"], data=tmp_path)
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None if name == "langdetect" else name)
    with pytest.raises(ImportError, match=r"ifeval needs langdetect: pip install 'lm_eval\[ifeval\]'"):
        base_capabilities(model, tokenizer, ["ifeval"], data=folder)
