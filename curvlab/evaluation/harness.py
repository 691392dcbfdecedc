"""Base capabilities of a real model through lm-evaluation-harness, with the paper's tasks and shots."""

import copy
import importlib.util
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from curvlab.evaluation.intervals import Interval, bootstrap
from curvlab.evaluation.local_benchmarks import write_tasks
from curvlab.evaluation.mode import evaluating


@dataclass(frozen=True)
class Benchmark:
    """A task of the harness, and what is reported of it.

    Attributes:
        shots: examples in the prompt.
        measure, filter: the harness' names of the number reported.
        new_tokens: what a generation may take; 0 where nothing is generated.
        needs: packages besides the harness.
    """

    task: str
    shots: int
    measure: str
    filter: str = "none"
    new_tokens: int = 0
    needs: tuple[str, ...] = ()


PAPER = {
    "mmlu": Benchmark("mmlu", 5, "acc"),
    "ifeval": Benchmark(
        "ifeval", 0, "prompt_level_strict_acc", new_tokens=1280, needs=("langdetect", "immutabledict", "nltk")
    ),
    "truthfulqa": Benchmark("truthfulqa_mc2", 0, "acc"),
    "arc_challenge": Benchmark("arc_challenge", 25, "acc_norm"),
    "gsm8k": Benchmark("gsm8k_cot", 8, "exact_match", "strict-match", new_tokens=256),
}


@dataclass(frozen=True)
class Score:
    """A benchmark's result.

    Attributes:
        interval: the reported measure's mean over examples, with its bootstrap interval.
        values: (n,) the measure for each example; the same examples in the same order for every model.
        measures: everything the harness computed, named "measure,filter".
    """

    interval: Interval
    values: list[float]
    measures: dict[str, float]


def base_capabilities(
    model: PreTrainedModel,
    tokenizer: Any,
    benchmarks: Sequence[str] = tuple(PAPER),
    *,
    limit: int | None = 200,
    shots: int | None = None,
    data: str | Path | None = None,
    batch_size: int = 8,
    chat: bool | None = None,
    seed: int = 0,
) -> dict[str, Score]:
    """Scores of a loaded model by benchmark: "mmlu", "ifeval", "truthfulqa", "arc_challenge", "gsm8k".

    Args:
        limit: the first so many examples of each task (of each of MMLU's 57 subjects), None for all; the paper's 200
            leave a standard error of three points.
        shots: examples in the prompt; None takes the paper's.
        data: a folder with benchmark files (`write_tasks` says which), for work without a network; None lets the
            harness fetch its data.
        chat: prompts in the tokenizer's chat template, examples as turns, as the paper has it; None where the tokenizer
            has a template.
        seed: of the examples drawn for the prompts, and of the bootstrap. The global generators are left alone.

    A prompt longer than the model's context loses its beginning, and a generation takes at most half of it. Of the
    measures the paper does not say which it means: reported are acc_norm for ARC-Challenge, strict-match for GSM8K
    and strict accuracy over prompts for IFEval; the others are in `measures`.

    Raises:
        ImportError: lm-evaluation-harness, or what IFEval needs besides, is not installed.
        ValueError: an unknown benchmark, or one that `data` cannot hold.
        FileNotFoundError: no file for a benchmark in `data`.
    """
    _check(benchmarks)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    chat = getattr(tokenizer, "chat_template", None) is not None if chat is None else chat
    scores = {}
    with tempfile.TemporaryDirectory(prefix="curvlab-benchmarks-") as name, _undisturbed(), evaluating(model):
        local = {} if data is None else write_tasks(data, Path(name), benchmarks)
        manager = TaskManager(include_path=name, include_defaults=False) if local else TaskManager()
        # the harness sets a padding token on the tokenizer it is given
        language_model = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        room = language_model.max_length // 2
        for benchmark in benchmarks:
            what = PAPER[benchmark]
            found = simple_evaluate(
                model=language_model,
                tasks=[local.get(benchmark, what.task)],
                num_fewshot=what.shots if shots is None else shots,
                limit=limit,
                task_manager=manager,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                gen_kwargs={"max_gen_toks": min(what.new_tokens, room)} if what.new_tokens else None,
                bootstrap_iters=0,  # intervals are ours
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
            scores[benchmark] = _score(found, local.get(benchmark, what.task), what, seed)
    return scores


def _score(found: Any, task: str, what: Benchmark, seed: int) -> Score:
    # a group such as MMLU has the examples of all its tasks
    samples = [sample for of_task in found["samples"].values() for sample in of_task]
    values = [float(sample[what.measure]) for sample in samples if sample["filter"] == what.filter]
    numbers = {name: value for name, value in found["results"][task].items() if isinstance(value, (int, float))}
    measures = {name: float(value) for name, value in numbers.items() if "," in name and "stderr" not in name}
    return Score(bootstrap(values, seed=seed), values, measures)


def _check(benchmarks: Sequence[str]) -> None:
    unknown = [name for name in benchmarks if name not in PAPER]
    if unknown or not benchmarks:
        raise ValueError(f"unknown benchmarks {unknown}; choose among {', '.join(PAPER)}")
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("base capabilities need lm-evaluation-harness: pip install lm_eval")
    for name in benchmarks:
        missing = [package for package in PAPER[name].needs if importlib.util.find_spec(package) is None]
        if missing:
            raise ImportError(f"{name} needs {', '.join(missing)}: pip install 'lm_eval[{name}]'")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """The harness seeds every global generator; give them their state back."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
