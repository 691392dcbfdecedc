"""The judge against a server on this machine that speaks just enough of the protocol."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from curvlab.evaluation.judge import JudgeError, LLMJudge
from curvlab.evaluation.judging import Reply

GOOD, BAD = Reply("Where was Ada born?", "London", "In London"), Reply("Where was Bob born?", "Oslo", "Rome")


class Server(ThreadingHTTPServer):
    """Answers each question with the next of its planned (status, headers, body); remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.paths: list[str] = []
        self.plan: list[tuple[int, dict[str, str], str]] = []
        self.delay = 0.0
        self.under_way = Counter[str]()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with self.server.lock:
            self.server.asked.append(body)
            self.server.headers.append(self.headers)
            self.server.paths.append(self.path)
            self.server.under_way["now"] += 1
            self.server.under_way["most"] = max(self.server.under_way["most"], self.server.under_way["now"])
            right = "Given answer: In London" in prompt
            planned = (
                self.server.plan.pop(0) if self.server.plan else (200, {}, said("CORRECT" if right else "incorrect."))
            )
        time.sleep(self.server.delay)
        with self.server.lock:
            self.server.under_way["now"] -= 1
        status, headers, text = planned
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())
        except BrokenPipeError:
            pass  # who timed out does not listen any more

    def log_message(self, *_: Any) -> None:
        pass


def said(content: str) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_verdicts_in_order_and_each_reply_once(server: Server) -> None:
    judge = LLMJudge(base_url=server.url, model="some-model")
    silent = Reply("Where was Eva born?", "Rome", " ")
    assert judge([BAD, GOOD, BAD, silent, GOOD]) == [0, 1, 0, 0, 1]
    assert len(server.asked) == 2
    assert judge([GOOD]) == [1]
    assert len(server.asked) == 2
    assert judge([]) == []


def test_what_is_sent(server: Server) -> None:
    braces = Reply("Q {answer}?", "{text}", "In London {question}")
    assert LLMJudge(base_url=server.url, model="some-model", key="secret")([braces]) == [1]
    (body,) = server.asked
    assert (body["model"], body["temperature"]) == ("some-model", 0)
    content = body["messages"][0]["content"]
    assert "Question: Q {answer}?\nExpected answer: {text}\nGiven answer: In London {question}\n" in content
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_settings_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    assert LLMJudge()([GOOD]) == [1]
    assert server.headers[0]["Authorization"] is None
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    assert LLMJudge()([BAD]) == [0]
    assert server.headers[1]["Authorization"] == "Bearer from-environment"
    assert "from-environment" not in repr(LLMJudge())


def test_requests_are_under_way_together(server: Server) -> None:
    server.delay = 0.05
    replies = [Reply(str(i), "London", "In London" if i % 3 else "Rome") for i in range(12)]
    assert LLMJudge(base_url=server.url, workers=4)(replies) == [float(i % 3 > 0) for i in range(12)]
    assert server.under_way["most"] == 4


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_tried_again(server: Server, status: int) -> None:
    server.plan = [(status, {}, "busy"), (status, {"Retry-After": "0"}, "busy")]
    assert LLMJudge(base_url=server.url, pause=0.01)([GOOD]) == [1]
    assert len(server.asked) == 3


def test_a_reply_without_a_verdict_is_tried_again(server: Server) -> None:
    server.plan = [(200, {}, said("I think so")), (200, {}, said("CORRECT or INCORRECT?"))]
    assert LLMJudge(base_url=server.url, pause=0.01)([BAD]) == [0]
    server.plan = [(200, {}, said("Maybe"))] * 2
    with pytest.raises(JudgeError, match=r"failed 2 times: expected CORRECT or INCORRECT, it said 'Maybe'"):
        LLMJudge(base_url=server.url, pause=0.01, retries=1)([BAD])


def test_timeouts(server: Server) -> None:
    server.delay = 0.5
    with pytest.raises(JudgeError, match=r"failed 2 times.*timed out"):
        LLMJudge(base_url=server.url, timeout=0.05, pause=0.01, retries=1)([GOOD])


@pytest.mark.parametrize("status", [400, 401, 404])
def test_refusals_are_not_tried_again(server: Server, status: int) -> None:
    server.plan = [(status, {}, '{"error": {"message": "no such model"}}')]
    with pytest.raises(JudgeError, match=rf"'gpt-4o-mini'.*refuses: HTTP {status}.*no such model"):
        LLMJudge(base_url=server.url)([GOOD])
    assert len(server.asked) == 1


def test_no_chat_completion(server: Server) -> None:
    for text in ("<html>", '{"choices": []}', "[]"):
        server.plan = [(200, {}, text)]
        with pytest.raises(JudgeError, match="gave no chat completion"):
            LLMJudge(base_url=server.url)([GOOD])


def test_nobody_there() -> None:
    with pytest.raises(JudgeError, match="failed 1 times"):
        LLMJudge(base_url="http://127.0.0.1:9/v1", retries=0, timeout=2)([GOOD])


def test_settings_that_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match="OPENAI_BASE_URL"):
        LLMJudge()
    with pytest.raises(ValueError, match="such as http"):
        LLMJudge(base_url="localhost:8000")
    with pytest.raises(ValueError, match=r"lacks \{question\}, \{text\}"):
        LLMJudge(base_url="http://x", prompt="{answer}")
