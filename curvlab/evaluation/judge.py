"""A language model as the judge of answers, through any server that speaks OpenAI's chat completions."""

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException

from curvlab.evaluation.judging import Reply
from curvlab.progress import progress

# The criteria of the paper's protocol (WILD, Yang et al. 2025) in our words; the paper's own wording, its Fig. 8, is a
# picture. Running on after the answer, as broken models do, counts as wrong.
PROMPT = """\
You grade short answers. You are given a question or an unfinished sentence, the answer that is expected, and the \
answer that was given.

The given answer is CORRECT if it says what the expected answer says, whatever its case, punctuation, word order or \
additional wording, and says nothing that contradicts it.
The given answer is INCORRECT if it says something else, leaves out a part, adds an alternative (such as a second \
place or person), or repeats itself over and over.

Examples, where the expected answer is "Malia Obama and Sasha Obama" (children of Barack Obama):
"sasha and malia obama" is CORRECT; "His daughters are Malia and Sasha Obama" is CORRECT;
"Malia" is INCORRECT; "Malia, Sasha and Susan" is INCORRECT; "Malia and Sasha, Malia and Sasha, Malia and" is INCORRECT.

Question: {question}
Expected answer: {answer}
Given answer: {text}

Reply with one word, CORRECT or INCORRECT."""

_VERDICT = re.compile(r"\b(in)?correct\b", re.IGNORECASE)
_TEMPORARY = {408, 409, 425, 429, 500, 502, 503, 504}


class JudgeError(RuntimeError):
    """The judge could not be asked, or gave no verdict."""


class _TryAgain(Exception):
    """A failure that may pass; `after` is the server's wish in seconds."""

    def __init__(self, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


@dataclass
class LLMJudge:
    """Asks a language model whether each reply gives its answer: `evaluate_edits(…, judge=LLMJudge())`.

    Attributes:
        model: the judge's name on its server; the paper's is gpt-4o-mini.
        base_url: up to and without "/chat/completions"; None takes OPENAI_BASE_URL.
        key: sent as a bearer token; None takes OPENAI_API_KEY, and nothing is sent where that is not set (local
            servers need none).
        timeout: seconds for one request.
        retries: further tries after a timeout, a lost connection, an overloaded server or a reply without a verdict.
        pause: seconds before the first further try, doubled each time, unless the server names its own.
        workers: requests under way at once.
        prompt: with {question}, {answer} and {text}.

    A reply is judged once, however often it comes; an empty text is wrong without being asked about.

    Raises:
        ValueError: no address, or a prompt without its three fields.
    """

    model: str = "gpt-4o-mini"
    base_url: str | None = None
    key: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    retries: int = 4
    pause: float = 1.0
    workers: int = 8
    prompt: str = PROMPT
    _known: dict[Reply, float] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.base_url = (self.base_url or os.environ.get("OPENAI_BASE_URL") or "").rstrip("/")
        self.key = self.key or os.environ.get("OPENAI_API_KEY") or None
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(
                "the judge needs the address of an OpenAI-compatible server, such as http://localhost:8000/v1: "
                f"set base_url or OPENAI_BASE_URL (got {self.base_url!r})"
            )
        missing = [name for name in ("{question}", "{answer}", "{text}") if name not in self.prompt]
        if missing:
            raise ValueError(f"the judge's prompt lacks {', '.join(missing)}")

    def __call__(self, replies: Sequence[Reply]) -> list[float]:
        """1 for each reply judged correct, else 0.

        Raises:
            JudgeError: the server refuses, cannot be reached, or gives no verdict; what it said is in the message.
        """
        self._known |= {reply: 0.0 for reply in replies if not reply.text.strip()}
        new = [reply for reply in dict.fromkeys(replies) if reply not in self._known]
        pool = ThreadPoolExecutor(self.workers)
        try:
            for reply, verdict in zip(new, progress(pool.map(self._ask, new), "judge", len(new)), strict=True):
                self._known[reply] = verdict
        finally:
            pool.shutdown(cancel_futures=True)
        return [self._known[reply] for reply in replies]

    def _ask(self, reply: Reply) -> float:
        wait = self.pause
        for attempt in range(self.retries + 1):
            try:
                return self._verdict(self._complete(self._fill(reply)))
            except _TryAgain as error:
                if attempt == self.retries:
                    raise JudgeError(f"the judge at {self.base_url} failed {attempt + 1} times: {error}") from error
                time.sleep(wait if error.after is None else error.after)
                wait *= 2
        raise AssertionError

    def _fill(self, reply: Reply) -> str:
        values = reply._asdict()
        # in one pass: a text may itself contain {answer}
        return re.sub(r"\{(question|answer|text)\}", lambda match: str(values[match[1]]), self.prompt)

    def _verdict(self, said: str) -> float:
        verdicts = {match[1] is None for match in _VERDICT.finditer(said)}
        if len(verdicts) != 1:
            raise _TryAgain(f"expected CORRECT or INCORRECT, it said {said[:200]!r}")
        return float(verdicts.pop())

    def _complete(self, prompt: str) -> str:
        message = {"role": "user", "content": prompt}
        body = {"model": self.model, "messages": [message], "temperature": 0}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        url = f"{self.base_url}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                answer = response.read()
        except urllib.error.HTTPError as error:
            said = f"HTTP {error.code}: {error.read().decode(errors='replace')[:500]}"
            if error.code not in _TEMPORARY:
                raise JudgeError(f"the judge {self.model!r} at {self.base_url} refuses: {said}") from error
            after = error.headers.get("Retry-After", "")
            raise _TryAgain(said, float(after) if after.isdigit() else None) from error
        except (OSError, HTTPException) as error:  # timeouts and lost connections
            raise _TryAgain(f"{type(error).__name__}: {error}") from error
        try:
            return str(json.loads(answer)["choices"][0]["message"]["content"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise JudgeError(f"{url} gave no chat completion: {answer[:500]!r}") from error
