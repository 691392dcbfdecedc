"""Edit sets as people have them on disk: EasyEdit, ZsRE/MEND, WikiBigEdit, ROME's CounterFact, and plain JSONL."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SHOWN = 20  # problems of a file that are written out; a wrong file has the same one in every record


@dataclass(frozen=True)
class _Format:
    """Names of a record's fields; `paraphrases` and `neighbours` are alternatives, of which a record has any."""

    name: str
    prompt: str
    target: str
    truth: str
    paraphrases: tuple[str, ...]
    neighbours: tuple[tuple[str, str], ...] = ()
    nested: str = ""  # a field with (prompt, answer) pairs


_FORMATS = (
    _Format(
        "EasyEdit",
        "prompt",
        "target_new",
        "ground_truth",
        ("rephrase_prompt", "rephrase_prompts", "rephrase", "paraphrase_prompts"),
        (("locality_prompt", "locality_ground_truth"),),
        "locality",
    ),
    _Format("ZsRE/MEND", "src", "alt", "answers", ("rephrase",), (("loc", "loc_ans"),)),
    _Format("WikiBigEdit", "update", "ans", "ground_truth", ("rephrase",), (("loc", "loc_ans"),)),
    _Format("CounterFact (ROME)", "requested_rewrite", "requested_rewrite", "", ()),
    _Format("JSONL", "prompt", "target", "truth", ("paraphrases",), (), "neighbours"),
)
_NAMES = ("prompt", "src", "question", "loc")  # names a nested neighbour's prompt goes by
_ANSWERS = ("answer", "ground_truth", "target")
_SURROGATE = re.compile("[\ud800-\udfff]")


def lone_surrogate(text: str) -> str:
    """The first half of a character in a text (JSON can hold one: "\\ud83d"), which no tokenizer reads; "" if none."""
    found = _SURROGATE.search(text)
    return found[0] if found else ""


def read_fields(path: Path) -> list[dict[str, Any]]:
    """The fields prompt, target, subject, paraphrases, neighbours and truth of every record of a file.

    The format is the one whose prompt and target most records have.

    Raises:
        ValueError: damaged JSON, an empty file, fields missing or of the wrong type, NaN or half a character as a
            text, a neighbour without its prompt or answer.
    """
    records = []
    for where, record in read_records(path):
        if not isinstance(record, dict):
            raise ValueError(f"{path}, {where}: expected an object with fields, got {type(record).__name__}")
        records.append((where, record))
    if not records:
        raise ValueError(f"{path} holds no requests; expected a JSON list of objects, or an object a line")
    format_ = _detect(path, records)
    read, problems = [], []
    for where, record in records:
        try:
            read.append(_fields(record, format_))
        except _FieldError as error:
            problems.append(f"{where}: {error}")
    if problems:
        shown = "\n  ".join(problems[:_SHOWN]) + ("\n  …" if len(problems) > _SHOWN else "")
        raise ValueError(
            f"{path} ({format_.name} format): {len(problems)} of {len(records)} records are unusable:\n  {shown}"
        )
    return read


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        ValueError: it is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from error


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, record) of a JSON list, or of one JSON value a line.

    Raises:
        ValueError: damaged JSON (file and line are named), or no UTF-8.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is damaged JSON: {error}") from error
        yield from ((f"record {i}", record) for i, record in enumerate(records))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number} is damaged JSON ({error}); expected a JSON list, or an object a line"
                ) from error


def _detect(path: Path, records: list[tuple[str, dict[str, Any]]]) -> _Format:
    """The format whose prompt and target most records have."""

    def fits(format_: _Format) -> int:
        return sum(format_.prompt in record and format_.target in record for _, record in records)

    best = max(_FORMATS, key=fits)
    if not fits(best):
        # one of the two fields tells which is missing
        best = max(_FORMATS, key=lambda f: sum(f.prompt in record or f.target in record for _, record in records))
        where, record = records[0]
        known = "; ".join(f"{f.name}: {f.prompt}, {f.target}" for f in _FORMATS)
        missing = [name for name in (best.prompt, best.target) if name not in record]
        raise ValueError(
            f"{path}, {where}: field {missing[0]!r} is missing; no known format has just the fields "
            f"{', '.join(record) or '(none)'}. Required fields: {known}"
        )
    return best


class _FieldError(ValueError):
    """A record whose fields cannot be read."""


def _fields(record: dict[str, Any], format_: _Format) -> dict[str, Any]:
    if format_.prompt == "requested_rewrite":
        record, format_ = _from_rome(record), _FORMATS[0]
    neighbours: list[tuple[str, str]] = []
    for prompt, answer in format_.neighbours:
        neighbours += _pairs(record, prompt, answer)
    if format_.nested:
        neighbours += _nested(record.get(format_.nested), format_.nested)
    return {
        "prompt": _text(record, format_.prompt),
        "target": _text(record, format_.target),
        "subject": next(iter(_texts(record, "subject")), ""),
        "paraphrases": tuple(text for name in format_.paraphrases for text in _texts(record, name)),
        "neighbours": tuple(neighbours),
        "truth": next(iter(_texts(record, format_.truth)), ""),
    }


def _pairs(record: dict[str, Any], prompt: str, answer: str, where: str = "") -> Sequence[tuple[str, str]]:
    """Prompts with the answers in the same places; a place that is empty in both is left out."""
    prompts, answers = _entries(record, prompt, where), _entries(record, answer, where)
    if not any(prompts + answers):
        return []
    if len(prompts) == 1:
        answers = list(filter(None, answers))[:1] or answers[:1]  # the others are further spellings
    if len(prompts) != len(answers):
        raise _FieldError(
            f"field {where + prompt!r} has {len(prompts)} prompts but {where + answer!r} {len(answers)} answers"
        )
    pairs = list(zip(map(_question, prompts), answers, strict=True))
    for i, (asked, said) in enumerate(pairs):
        if bool(asked) != bool(said):
            empty, other = (prompt, answer) if said else (answer, prompt)
            raise _FieldError(f"field {where + empty!r} is empty in place {i}, {where + other!r} is {asked or said!r}")
    return [pair for pair in pairs if any(pair)]


def _from_rome(record: dict[str, Any]) -> dict[str, Any]:
    """A record of the original CounterFact (Meng et al. 2022) with EasyEdit's field names."""
    rewrite = record.get("requested_rewrite")
    if not isinstance(rewrite, dict):
        raise _FieldError("field 'requested_rewrite' must be an object")
    subject, neighbours = _text(rewrite, "subject"), _texts(record, "neighborhood_prompts")
    texts = {}
    for name in ("target_new", "target_true"):
        target = rewrite.get(name)
        if not isinstance(target, dict) or "str" not in target:
            raise _FieldError(f"field 'requested_rewrite.{name}.str' is missing")
        texts[name] = target["str"]
    return {
        "prompt": _text(rewrite, "prompt").replace("{}", subject),
        "target_new": texts["target_new"],
        "ground_truth": texts["target_true"],
        "subject": subject,
        "paraphrase_prompts": record.get("paraphrase_prompts"),
        "locality_prompt": neighbours,
        "locality_ground_truth": [texts["target_true"]] * len(neighbours),
    }


def _nested(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """(prompt, answer) pairs of lists, of objects, and of objects by name (EasyEdit's `locality`)."""
    if value is None:
        return
    if isinstance(value, dict) and not any(key in value for key in _NAMES):
        for key, inner in value.items():
            yield from _nested(inner, f"{name}.{key}")
    elif isinstance(value, dict):
        prompt = next(key for key in _NAMES if key in value)
        answer = next((key for key in _ANSWERS if key in value), None)
        if answer is None:
            raise _FieldError(f"field '{name}.{_ANSWERS[0]}' is missing")
        yield from _pairs(value, prompt, answer, f"{name}.")
    elif isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
        yield from _pairs(dict(zip(("[0]", "[1]"), value, strict=True)), "[0]", "[1]", name)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _nested(inner, f"{name}[{i}]")
    else:
        raise _FieldError(f"field {name!r} must hold [prompt, answer] pairs, got {type(value).__name__}")


def _text(record: dict[str, Any], name: str) -> str:
    """A required text, without surrounding white space; it may be empty, which `check_requests` reports."""
    if record.get(name) is None:
        raise _FieldError(f"field {name!r} is missing")
    texts = _texts(record, name)
    if len(texts) > 1:
        raise _FieldError(f"field {name!r} must be one text, got {len(texts)}")
    return texts[0] if texts else ""


def _texts(record: dict[str, Any], name: str) -> list[str]:
    """The texts of a field, empty ones left out."""
    return [text for text in _entries(record, name) if text]


def _entries(record: dict[str, Any], name: str, where: str = "") -> list[str]:
    """The texts of a field that is a string, a number, a list of these, or absent; what is empty in a list is ""."""
    value = record.get(name)
    if value is None:
        return []
    texts = []
    for item in value if isinstance(value, list) else [value]:
        while isinstance(item, list) and item:  # KnowEdit lists the spellings of each answer
            item = item[0]
        if item is None or item == []:
            item = ""
        if isinstance(item, bool) or not isinstance(item, (str, int, float)):
            raise _FieldError(f"field {where + name!r} must be a text or a list of texts, got {type(item).__name__}")
        if isinstance(item, float) and not math.isfinite(item):
            raise _FieldError(f"field {where + name!r} must be a text or a list of texts, got {item}")
        text = str(item).strip()
        if half := lone_surrogate(text):
            raise _FieldError(f"field {where + name!r} holds the lone surrogate {half!r}")
        texts.append(text)
    return texts


def _question(prompt: str) -> str:
    """ "nq question: when did it open" → "When did it open?" (ZsRE's neighbours come from Natural Questions)."""
    prefix = "nq question:"
    if not prompt.lower().startswith(prefix):
        return prompt
    text = prompt[len(prefix) :].strip()
    return text[:1].upper() + text[1:].rstrip("?").rstrip() + "?"
