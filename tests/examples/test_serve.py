"""The server, asked over the loopback address."""

import http.client
import json
import socket
import string
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from examples import serve
from lightning_dsmoe import (
    SelectionPlan,
    SparseModel,
    SwitchPoints,
    Threshold,
    TopK,
    compile_sparse,
)
from lightning_dsmoe.inference.continuous_batch import Continuation, ContinuousBatch
from lightning_dsmoe.tokenizers import CharTokenizer

from ..inference.conftest import rotary_glu

pytestmark = pytest.mark.slow

LETTERS = CharTokenizer(string.ascii_lowercase + " .\n")
PROMPTS = ["a", "in the end ", "two. ", "the quick brown fox jumps", "\n"]


@pytest.fixture(scope="module")
def model() -> SparseModel:
    torch.manual_seed(3)
    plan = SelectionPlan(experts=Threshold(0.9), attention=TopK(1))
    points = SwitchPoints(gather_up_to=0)
    return compile_sparse(
        rotary_glu(), plan, switch_points=points, tokenizer=LETTERS, context_length=64
    )


class Server:
    """A server in a thread of its own, and what its model is doing."""

    def __init__(self, model: SparseModel, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.batches: list[ContinuousBatch] = []
        self.sizes: set[int] = set()
        server = self

        class Watched(ContinuousBatch):
            def __init__(self, model: SparseModel) -> None:
                super().__init__(model)
                server.batches.append(self)

            def step(self) -> None:
                server.sizes.add(len(self.running))
                super().step()

        monkeypatch.setattr(serve, "ContinuousBatch", Watched)
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        app = serve.app_of(model, **options)
        self.worker: serve.Worker = app.state.worker
        monkeypatch.setattr(serve, "SECONDS_TO_END", 1)
        self.uvicorn = serve.Server(app, port=self.port, log_level="error")
        self.thread = threading.Thread(target=self.uvicorn.run)
        self.thread.start()
        while not self.uvicorn.started:
            assert self.thread.is_alive()
            time.sleep(0.01)

    def stop(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def open(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, fields: Any, path: str = "/v1/completions") -> tuple[int, Any]:
        connection = self.open()
        body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, json.loads(content)

    def start(self, fields: dict[str, Any]) -> http.client.HTTPConnection:
        connection = self.open()
        connection.request("POST", "/v1/completions", json.dumps(fields))
        return connection

    def stream(self, fields: dict[str, Any]) -> list[dict[str, Any]]:
        connection = self.start({**fields, "stream": True})
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        *events, done, rest = answer.read().decode().split("\n\n")
        connection.close()
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.fixture
def server(model: SparseModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    running = Server(model, monkeypatch)
    yield running
    running.stop()


def leave(connection: http.client.HTTPConnection) -> None:
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()


class Held:
    """Keeps the model, which takes one text at a time, at its next token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started, self.go_on = threading.Event(), threading.Event()
        step = ContinuousBatch.step

        def held(batch: ContinuousBatch) -> None:
            self.started.set()
            assert self.go_on.wait(30)
            step(batch)

        monkeypatch.setattr(ContinuousBatch, "step", held)
        monkeypatch.setattr(
            ContinuousBatch, "n_free", property(lambda batch: 1 - len(batch.running))
        )
        monkeypatch.setattr(serve, "SECONDS_BETWEEN_LOOKS", 0.01)


def assert_all_end(asked: list[http.client.HTTPConnection]) -> None:
    """Whether each request gets its text, of the length that it asked for."""
    for connection in asked:
        answer = connection.getresponse()
        assert (answer.status, b'"length"' in answer.read()) == (200, True)
        connection.close()


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def alone(model: SparseModel, fields: dict[str, Any]) -> str:
    """The text without the server, which leaves the stop text out."""
    options = {"temperature": fields.get("temperature", 1), "stop": fields.get("stop")}
    generator = torch.Generator().manual_seed(fields.get("seed", 0))
    text = model.generate(fields["prompt"], fields["max_tokens"], generator=generator, **options)
    text = text[len(fields["prompt"]) :]
    stop = fields.get("stop")
    return text.removesuffix(stop) if stop else text


def test_many_clients_get_the_texts_that_they_would_get_alone(
    server: Server, model: SparseModel
) -> None:
    asked = [
        {
            "prompt": PROMPTS[n % 5],
            "max_tokens": 3 + n % 11,
            "temperature": n % 3 / 2,
            "seed": n,
            **({"stop": "e"} if n % 4 == 0 else {}),
        }
        for n in range(200)
    ]

    def text_of(fields: dict[str, Any]) -> str:
        if fields["seed"] % 2:
            return "".join(event["choices"][0]["text"] for event in server.stream(fields))
        status, answer = server.ask(fields)
        assert status == 200
        used = answer["usage"]
        assert used["prompt_tokens"] == len(fields["prompt"])
        assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]
        [choice] = answer["choices"]
        assert choice["finish_reason"] in ("length", "stop")
        if choice["finish_reason"] == "length":
            assert used["completion_tokens"] == fields["max_tokens"]
        found: str = choice["text"]
        return found

    with ThreadPoolExecutor(8) as clients:
        found = list(clients.map(text_of, asked))
    assert found == [alone(model, fields) for fields in asked]
    assert max(server.sizes) > 1
    assert server.batches[0].running == []


def test_a_stream_ends_with_its_reason(server: Server) -> None:
    events = server.stream({"prompt": "a", "max_tokens": 7, "temperature": 0})
    assert {event["object"] for event in events} == {"text_completion"}
    assert len({event["id"] for event in events}) == 1
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons == [None] * 7 + ["length"]


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"prompt": None}, "prompt", "prompt is missing"),
        ({"prompt": ""}, "prompt", "a prompt must have a token or more"),
        ({"prompt": ["a"]}, "prompt", "prompt must be str, got ['a']"),
        ({"prompt": "A"}, "prompt", "'A'"),
        ({"prompt": "a" * 60}, "prompt", "the prompt has 60 tokens, which with 5 new ones do not"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be from 1 to 64, got 0"),
        ({"max_tokens": 65}, "max_tokens", "max_tokens must be from 1 to 64, got 65"),
        ({"max_tokens": True}, "max_tokens", "max_tokens must be int, got True"),
        ({"temperature": -1}, "temperature", "temperature must be 0 or from 1e-06 to 1e+06"),
        ({"temperature": float("nan")}, "temperature", "temperature must be 0 or from"),
        ({"temperature": "hot"}, "temperature", "temperature must be int or float, got 'hot'"),
        ({"top_p": 0}, "top_p", "top_p must be above 0 and at most 1, got 0"),
        ({"top_k": 0}, "top_k", "top_k must be at least 1, got 0"),
        ({"seed": 2**64}, "seed", "seed must have 64 bits or fewer"),
        ({"stop": [3]}, "stop", "stop must be one text or several"),
        ({"stop": ["a"] * 999}, "stop", "stop must have at most 1,000 characters"),
        ({"n": 2}, "n", "n must be 1"),
        ({"stream": 1}, "stream", "stream must be bool, got 1"),
        ({"best_of": 3}, "best_of", "no field 'best_of'; there are model, prompt, max_tokens"),
        ({"\ud800": 3}, "\ud800", r"no field '\ud800'"),
    ],
)
def test_bad_requests_name_the_field(
    change: dict[str, Any], field: str, message: str, server: Server
) -> None:
    status, answer = server.ask({"prompt": "a", "max_tokens": 5, **change})
    assert status == 400
    assert answer["error"]["param"] == field
    assert answer["error"]["type"] == "invalid_request_error"
    assert message in answer["error"]["message"]


def test_what_is_no_request(server: Server) -> None:
    for body, message in (
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "must be a JSON object"),
        (b"\xff", "is not JSON"),
    ):
        status, answer = server.ask(body)
        assert status == 400
        assert message in answer["error"]["message"]
    status, answer = server.ask({"prompt": "a", "model": "gpt"})
    assert (status, answer["error"]["param"]) == (404, "model")
    assert server.ask({}, "/v1/chat")[0] == 404
    status, answer = server.ask({"prompt": "a" * 2**20})
    assert (status, answer["error"]["message"]) == (413, "a request has at most 1,048,576 bytes")
    connection = server.open()
    connection.request("GET", "/v1/completions")
    refused = connection.getresponse()
    assert (refused.status, refused.headers["Allow"]) == (405, "POST")
    connection.close()
    assert server.ask({"prompt": "a", "max_tokens": 2})[0] == 200  # it goes on


def test_a_client_that_leaves_within_its_request_is_no_error(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    monkeypatch.setattr(serve.LOG, "error", lambda text, **_: logged.append(text))
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{")
    time.sleep(0.2)
    connection.close()
    time.sleep(0.2)
    assert server.ask({"prompt": "a", "max_tokens": 2})[0] == 200
    assert logged == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(
    stream: bool, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    step = ContinuousBatch.step

    def slow(self: ContinuousBatch) -> None:
        steps.append([each.n_left for each in self.running])
        time.sleep(0.02)
        step(self)

    monkeypatch.setattr(ContinuousBatch, "step", slow)
    connection = server.start({"prompt": "a", "max_tokens": 63, "stream": stream})
    while len(steps) < 3:
        time.sleep(0.005)
    leave(connection)
    assert server.ask({"prompt": "a", "max_tokens": 40})[0] == 200
    assert not server.batches[0].running
    assert max(map(min, steps[-10:])) <= 10
    assert min(left for lefts in steps for left in lefts[:1]) >= 0
    assert len(steps[-1]) == 1  # the other one has left before its end


def test_a_failure_of_the_model_ends_the_requests_that_it_has_met(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: ContinuousBatch) -> None:
        raise FloatingPointError("the logits are not finite")

    logged: list[Any] = []
    monkeypatch.setattr(serve.LOG, "error", lambda text, exc_info: logged.append(exc_info))
    with monkeypatch.context() as patch:
        patch.setattr(ContinuousBatch, "step", fail)
        status, answer = server.ask({"prompt": "a", "max_tokens": 3})
        assert (status, answer["error"]["type"]) == (500, "server_error")
        message = "the model has failed; the server's log says why"
        assert answer["error"]["message"] == message
        events = server.stream({"prompt": "a"})
        assert events[-1]["error"]["message"] == message
    assert list(map(str, logged)) == ["the logits are not finite"] * 2
    assert logged[0].__traceback__ is not None
    assert server.ask({"prompt": "a", "max_tokens": 3})[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_stopping_does_not_wait_for_long_texts(
    stream: bool, model: SparseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(model, monkeypatch)
    started = threading.Event()
    step = ContinuousBatch.step

    def slow(self: ContinuousBatch) -> None:
        started.set()
        time.sleep(0.2)
        step(self)

    monkeypatch.setattr(ContinuousBatch, "step", slow)
    connection = server.start({"prompt": "a", "max_tokens": 63, "stream": stream})
    assert started.wait(30)
    server.stop()
    answer = connection.getresponse()
    assert answer.status == (200 if stream else 503)
    assert b"the server is being stopped" in answer.read()
    connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_more_requests_than_may_wait_are_told_to_come_again(
    stream: bool, model: SparseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, server = Held(monkeypatch), Server(model, monkeypatch, max_waiting=2)
    fields = {"prompt": "a", "max_tokens": 3, "stream": stream}
    asked = [server.start(fields)]
    assert held.started.wait(30)
    for n in (1, 2):
        asked.append(server.start(fields))
        wait_for(lambda n=n: len(server.worker._waiting) == n)  # type: ignore[misc]
    answer = (refused := server.start(fields)).getresponse()
    assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
    error = json.loads(answer.read())["error"]
    assert error["message"] == "2 requests wait already: try later"
    assert error["type"] == "rate_limit_error"
    refused.close()
    left = server.worker._waiting[0]
    leave(asked.pop(1))  # whose place is free again
    wait_for(lambda: not left.is_wanted)
    asked.append(server.start(fields))
    wait_for(lambda: left not in server.worker._waiting)
    held.go_on.set()
    assert_all_end(asked)
    server.stop()


def test_requests_that_there_are_places_for_are_not_refused(
    model: SparseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    monkeypatch.setattr(ContinuousBatch, "n_free", property(lambda batch: 3 - len(batch.running)))
    server = Server(model, monkeypatch, max_waiting=1)
    fields = {"prompt": "a", "max_tokens": 3}
    asked = [server.start(fields)]
    assert held.started.wait(30)
    asked += [server.start(fields) for _ in range(3)]  # two of them take places at the next token
    wait_for(lambda: len(server.worker._waiting) == 3)
    assert server.ask(fields)[0] == 429
    held.go_on.set()
    assert_all_end(asked)
    server.stop()


def test_a_stopped_server_answers_those_that_wait(
    model: SparseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, server = Held(monkeypatch), Server(model, monkeypatch)
    fields = {"prompt": "a", "max_tokens": 63}
    asked = [server.start(fields)]
    assert held.started.wait(30)
    asked += [server.start(fields), server.start({**fields, "stream": True})]
    wait_for(lambda: len(server.worker._waiting) == 2)
    stopping = threading.Thread(target=server.worker.stop)
    stopping.start()
    wait_for(lambda: server.worker._is_stopped)
    held.go_on.set()
    asked.append(server.start(fields))  # too late
    for status, connection in zip((503, 503, 200, 503), asked, strict=True):
        answer = connection.getresponse()
        assert (answer.status, answer.headers["Retry-After"]) in ((503, "1"), (200, None))
        assert answer.status == status  # that of a stream was sent before
        assert b"the server is being stopped" in answer.read()
        connection.close()
    stopping.join()
    server.stop()


def test_a_client_that_leaves_before_its_stream_begins(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, gone, step = threading.Event(), threading.Event(), ContinuousBatch.step
    made = serve.continuation_of

    def slow(model: SparseModel, fields: dict[str, Any]) -> Continuation:
        if fields.get("stream"):
            asked.set()
            assert gone.wait(30)
            time.sleep(0.2)  # so that the server notices
        return made(model, fields)

    def slow_step(self: ContinuousBatch) -> None:
        time.sleep(0.02)
        step(self)

    monkeypatch.setattr(ContinuousBatch, "step", slow_step)
    monkeypatch.setattr(serve, "continuation_of", slow)
    connection = server.start({"prompt": "a", "max_tokens": 63, "stream": True})
    assert asked.wait(30)
    assert server.ask({"prompt": "a", "max_tokens": 1})[0] == 200  # while tokens are found
    leave(connection)
    gone.set()
    wait_for(lambda: 1 in server.sizes)
    time.sleep(0.3)
    assert server.ask({"prompt": "a", "max_tokens": 3})[0] == 200
    assert not server.batches[0].running


def test_a_token_that_ends_a_text_ends_it(
    server: Server, model: SparseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model.generate("a", 9, temperature=0)
    end = int(LETTERS.encode(whole[4])[0])
    monkeypatch.setattr(CharTokenizer, "ends", property(lambda _: [end]))
    status, answer = server.ask({"prompt": "a", "max_tokens": 9, "temperature": 0})
    assert status == 200
    [choice] = answer["choices"]
    assert choice["text"] == whole[1 : whole.index(whole[4], 1)]
    assert choice["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len(choice["text"]) + 1


def test_a_prompt_is_limited_without_a_context_length(
    model: SparseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "context_length", None)
    monkeypatch.setattr(serve, "MOST_TOKENS", 20)
    server = Server(model, monkeypatch)
    status, answer = server.ask({"prompt": "a" * 16, "max_tokens": 5})
    assert (status, answer["error"]["param"]) == (400, "prompt")
    assert answer["error"]["message"] == "21 tokens with the prompt, at most 20"
    server.stop()


@pytest.mark.parametrize(
    ("text", "ended", "stops", "seen"),
    [
        ("one two", False, [], "one two"),
        ("one two", False, ["two three"], "one "),
        ("one two", False, ["o"], "one two"),
        ("one two", True, ["two"], "one "),
        ("one two", True, ["x", "wo", "two"], "one "),
        ("one\n", False, ["\n\n"], "one"),
    ],
)
def test_nothing_of_a_stop_text_is_shown(
    text: str, ended: bool, stops: list[str], seen: str, model: SparseModel
) -> None:
    continuation = Continuation(model, "a", 5, temperature=0)
    continuation.text.text += text
    continuation.finish_reason = "stop" if ended else None
    assert serve.shown(continuation, stops) == seen
    continuation.finish_reason = "length"
    assert serve.shown(continuation, stops) == text
