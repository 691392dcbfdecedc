"""What an edit did: reliability, generalisation and specificity, as generated and as teacher-forced."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from curvlab.data.edits import Request
from curvlab.data.text import PLAIN, fill
from curvlab.evaluation.generation import MAX_NEW_TOKENS, STOP, generate
from curvlab.evaluation.judging import Judge, Reply, exact_match, repeats
from curvlab.evaluation.teacher_forcing import token_match

MEASURES = ("reliability", "generalisation", "specificity")
TEACHER_FORCED = "_teacher_forced"


class _Question(NamedTuple):
    request: int
    measure: str
    prompt: str
    answer: str


def evaluate_edits(
    model: PreTrainedModel,
    tokenizer: Any,
    requests: Sequence[Request],
    *,
    template: str = PLAIN,
    judge: Judge = exact_match,
    teacher_forced: bool = True,
    max_new_tokens: int = MAX_NEW_TOKENS,
    stop: Sequence[str] = STOP,
    batch_size: int = 32,
) -> dict[str, list[float]]:
    """Measures of a model edited by `requests`, in [0, 1], one value a request, ready for `bootstrap`.

    Args:
        template: the prompt's context, `PLAIN` or `QA` (curvlab.data.text), for generation and teacher forcing.
        judge: `exact_match` (the paper's, on the whole generated text), `begins_with`, or an `LLMJudge`.
        stop: strings that end a generation; see `answers`.

    Returns:
        reliability: whether the prompt's generation gives the target.
        generalisation: the mean over the request's paraphrases.
        specificity: the mean over the request's neighbours, whose answers must have stayed; a neighbour that is
            itself the prompt of a request in the set is left out, since its answer was changed on purpose.
        …_teacher_forced: the same by `token_match`, where asked for.
        repetition: the share of the request's generations that end in repetition (`repeats`).

        Values are in the order of the requests; a request without paraphrases (or neighbours) has no value of
        that measure. Sets evaluated on the same requests can therefore be paired value by value.

    Raises:
        ValueError: no requests.
    """
    if not requests:
        raise ValueError("no requests were given")
    questions = _questions(requests)
    pairs = [(question.prompt, question.answer) for question in questions]
    texts = answers(
        model, tokenizer, pairs, template=template, max_new_tokens=max_new_tokens, stop=stop, batch_size=batch_size
    )
    judged = judge([Reply(*pair, text) for pair, text in zip(pairs, texts, strict=True)])
    found = {measure: _by_request(questions, judged, measure) for measure in MEASURES}
    if teacher_forced:
        matched = token_match(model, tokenizer, pairs, template=template, batch_size=batch_size)
        found |= {measure + TEACHER_FORCED: _by_request(questions, matched, measure) for measure in MEASURES}
    found["repetition"] = _by_request(questions, [float(repeats(text)) for text in texts])
    return found


def prompts_of(requests: Sequence[Request]) -> list[str]:
    """All prompts that `evaluate_edits` asks: of the requests, their paraphrases and their neighbours."""
    return [question.prompt for question in _questions(requests)]


def answers(
    model: PreTrainedModel,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    template: str = PLAIN,
    max_new_tokens: int = MAX_NEW_TOKENS,
    stop: Sequence[str] = STOP,
    batch_size: int = 32,
) -> list[str]:
    """What the model generates for the prompt of each (prompt, right answer).

    A prompt that occurs several times is generated once. A stop string that the right answer contains ("St. Louis")
    does not end that generation: no text could ever match it.
    """
    asked = [
        (fill(template, prompt), tuple(string for string in stop if string not in answer)) for prompt, answer in pairs
    ]
    texts: dict[tuple[str, tuple[str, ...]], str] = {}
    for strings in dict.fromkeys(strings for _, strings in asked):
        prompts = list(dict.fromkeys(prompt for prompt, own in asked if own == strings))
        new = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, stop=strings, batch_size=batch_size)
        texts |= {(prompt, strings): text for prompt, text in zip(prompts, new, strict=True)}
    return [texts[key] for key in asked]


def _questions(requests: Sequence[Request]) -> list[_Question]:
    edited = {request.prompt for request in requests}
    questions = []
    for i, request in enumerate(requests):
        questions.append(_Question(i, "reliability", request.prompt, request.target))
        questions += [_Question(i, "generalisation", prompt, request.target) for prompt in request.paraphrases]
        questions += [
            _Question(i, "specificity", prompt, answer) for prompt, answer in request.neighbours if prompt not in edited
        ]
    return questions


def _by_request(questions: Sequence[_Question], values: Sequence[float], measure: str | None = None) -> list[float]:
    """The mean over each request's questions of one measure (None: of all)."""
    groups: dict[int, list[float]] = {}
    for question, value in zip(questions, values, strict=True):
        if measure in (None, question.measure):
            groups.setdefault(question.request, []).append(value)
    return [fmean(group) for group in groups.values()]
