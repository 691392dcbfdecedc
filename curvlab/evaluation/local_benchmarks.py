"""Benchmark files on disk as tasks of lm-evaluation-harness: its own prompts, shots and metrics, other data."""

import csv
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]

SHOTS_FROM_ARC = 100  # questions at the end of an ARC slice that serve as examples, not as questions


@dataclass(frozen=True)
class _Local:
    """A task of the harness whose data are replaced.

    Attributes:
        file: pattern of the file's name.
        task: the harness' YAML, below its folder of tasks.
        splits: what makes the splits that this YAML names from the file.
    """

    file: str
    task: str
    splits: Callable[[Path], dict[str, list[Record]]]


def write_tasks(data: str | Path, folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Task files in `folder`, ready for `TaskManager(include_path=folder)`, for benchmark files in `data`.

    ARC-Challenge (arc_challenge*.json: the harness' own fields, or `instruction` with "Answer1: … Answer2: …" and
    `answer` = "answer2"; the last hundred questions give the shots), GSM8K (gsm8k*.jsonl), TruthfulQA
    (truthfulqa*.csv, the published columns) and IFEval (ifeval*.jsonl).

    Returns:
        The task's name for each of `names`.

    Raises:
        FileNotFoundError: no file for a name.
        ValueError: a name without a local form (MMLU), or a file of another shape.
    """
    import lm_eval.tasks

    shipped = Path(lm_eval.tasks.__file__).parent
    tasks = {}
    for name in names:
        if name not in _LOCAL:
            raise ValueError(f"{name!r} cannot be read from local files; those that can: {', '.join(_LOCAL)}")
        local = _LOCAL[name]
        found = sorted(Path(data).expanduser().glob(local.file))
        if not found:
            raise FileNotFoundError(f"no {local.file} in {data} for {name!r}")
        try:
            splits = local.splits(found[0])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{found[0]} is no file of {name!r}: {type(error).__name__}: {error}") from error
        files = {split: str(folder / f"{name}_{split}.jsonl") for split in splits}
        for split, records in splits.items():
            Path(files[split]).write_text("".join(json.dumps(record) + "\n" for record in records))
        task: Record = {
            "include": str(shipped / local.task),
            "task": f"{name}_local",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
            "tag": [],
            "validation_split": "validation" if "validation" in splits else None,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
        tasks[name] = f"{name}_local"
    return tasks


def _arc(path: Path) -> dict[str, list[Record]]:
    records = [record if "choices" in record else _from_instruction(record) for record in _json(path)]
    cut = max(len(records) - SHOTS_FROM_ARC, len(records) // 2)
    return {"test": records[:cut], "train": records[cut:]}


def _from_instruction(record: Record) -> Record:
    """The fields of ai2_arc from one text that holds the question and its options."""
    question, options = re.fullmatch(  # type: ignore[union-attr]  # None is reported as a file of another shape
        r"(?:Please choose the correct answer to the question: )?(.*?)\s*(Answer1:.*?)\s*(?:Answer format:.*)?",
        record["instruction"],
        re.DOTALL,
    ).groups()
    texts = [text.strip() for text in re.split(r"Answer\d+:", options)[1:]]
    labels = [chr(ord("A") + i) for i in range(len(texts))]
    answer = labels[int(record["answer"].removeprefix("answer")) - 1]
    return {"question": question, "choices": {"text": texts, "label": labels}, "answerKey": answer}


def _truthfulqa(path: Path) -> dict[str, list[Record]]:
    """`mc1` asks for the best answer among the wrong ones, `mc2` for the mass on all right ones."""
    records = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            right, wrong = _answers(row["Correct Answers"]), _answers(row["Incorrect Answers"])
            best = row["Best Answer"].strip()
            records.append(
                {
                    "question": row["Question"],
                    "mc1_targets": {"choices": [best, *wrong], "labels": [1] + [0] * len(wrong)},
                    "mc2_targets": {"choices": right + wrong, "labels": [1] * len(right) + [0] * len(wrong)},
                }
            )
    return {"validation": records}


def _answers(text: str) -> list[str]:
    return [answer.strip() for answer in text.split(";") if answer.strip()]


def _gsm8k(path: Path) -> dict[str, list[Record]]:
    return {"test": [{"question": record["question"], "answer": record["answer"]} for record in _json(path)]}


def _ifeval(path: Path) -> dict[str, list[Record]]:
    names = ("key", "prompt", "instruction_id_list", "kwargs")
    return {"train": [{name: record[name] for name in names} for record in _json(path)]}


def _json(path: Path) -> Sequence[Record]:
    """A JSON list, or a JSON object a line."""
    text = path.read_text(encoding="utf-8")
    lines = not text.lstrip().startswith("[")
    return [json.loads(line) for line in text.splitlines() if line.strip()] if lines else list(json.loads(text))


_LOCAL = {
    "arc_challenge": _Local("arc_challenge*.json*", "arc/arc_challenge.yaml", _arc),
    "gsm8k": _Local("gsm8k*.jsonl", "gsm8k/gsm8k-cot.yaml", _gsm8k),
    "truthfulqa": _Local("truthfulqa*.csv", "truthfulqa/truthfulqa_mc2.yaml", _truthfulqa),
    "ifeval": _Local("ifeval*.jsonl", "ifeval/ifeval.yaml", _ifeval),
}
