"""A server that continues texts: `/v1/completions` as OpenAI has it, with streaming.

    pip install -e '.[serve]'
    python examples/serve.py --artifact sparse_model

Requests join the batch that is being decoded, up to 16 at a time, and leave it when they end; as
many as `--max_waiting` wait for that, and more are refused.
"""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import uuid4

import uvicorn
from jsonargparse import auto_cli
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lightning_dsmoe import SparseModel, load_sparse
from lightning_dsmoe.inference.continuous_batch import Continuation, ContinuousBatch

FIELDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "prompt": (str,),
    "max_tokens": (int,),
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": (int,),
    "seed": (int,),
    "stop": (str, list),
    "stream": (bool,),
    "n": (int,),
    "user": (str,),
}
"""What a request may have. A field of null counts as not given."""
MOST_BYTES = 2**20
MOST_STOP_CHARACTERS = 1000  # all of them are compared with the end of a text at each token
MOST_TOKENS = 4096  # of a text, if the model has no context length
SECONDS_BETWEEN_LOOKS = 1.0  # whether a client is still there
SECONDS_TO_END = 30  # that running requests have when the server is stopped
SECONDS_TO_ANSWER = 5  # after that, for saying so
LOG = logging.getLogger("uvicorn.error")


class Refusal(Exception):
    """An answer that is no text: why, its status, and which field of the request is wrong."""

    def __init__(self, message: str, field: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.field, self.status = field, status


class Job:
    """A request that waits for its text, in the event loop of the server."""

    def __init__(self, continuation: Continuation, stops: list[str]) -> None:
        self.continuation, self.stops = continuation, stops
        self.is_wanted = True
        self._n_told = 0  # characters
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Queue[tuple[str, bool] | Refusal]()

    def tell(self, refusal: Refusal | None = None) -> None:
        """Say from the thread of the model how the text goes on, or that it does not."""
        text = shown(self.continuation, self.stops)
        piece, self._n_told = text[self._n_told :], len(text)
        has_ended = self.continuation.finish_reason is not None
        self._loop.call_soon_threadsafe(self._news.put_nowait, refusal or (piece, has_ended))

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it grows, without the stop text that ends it; "" if there is nothing new."""
        has_ended = False
        while not has_ended:
            try:
                news = await asyncio.wait_for(self._news.get(), SECONDS_BETWEEN_LOOKS)
            except TimeoutError:
                yield ""
                continue
            if isinstance(news, Refusal):
                raise news
            piece, has_ended = news
            yield piece


def shown(continuation: Continuation, stops: list[str]) -> str:
    """What a client may see: nothing of a stop text, and nothing that may yet become one."""
    text, reason = continuation.text.added, continuation.finish_reason
    if reason == "length":
        return text
    ends = [len(stop) if reason else len(stop) - 1 for stop in stops]
    held = [
        n
        for stop, most in zip(stops, ends, strict=True)
        for n in range(len(stop) if reason else 1, most + 1)
        if text.endswith(stop[:n])
    ]
    return text[: len(text) - max(held, default=0)]


class Worker:
    """The thread in which the model runs, and the requests that wait for it."""

    def __init__(self, model: SparseModel, max_waiting: int) -> None:
        self._batch, self._jobs = ContinuousBatch(model), list[Job]()
        self._waiting, self._max_waiting = list[Job](), max_waiting
        self._is_stopped = False
        self._news = threading.Condition()  # with its lock: what waits, and whether to stop
        # A daemon ends with the process, also where nobody has called `stop`.
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def end(self) -> None:
        """End all requests, and the thread, after the token that it is at."""
        with self._news:
            self._is_stopped = True
            self._news.notify()

    def stop(self) -> None:
        """End them, and wait for that."""
        self.end()
        self._thread.join()

    def put(self, job: Job) -> None:
        """Let a request wait for its turn, unless too many do."""
        with self._news:
            if self._is_stopped:
                raise stopping()
            self._waiting = [each for each in self._waiting if each.is_wanted]
            # Those for whom there is a place wait for the next token only.
            if len(self._waiting) >= self._max_waiting + self._batch.n_free:
                raise Refusal(f"{len(self._waiting)} requests wait already: try later", status=429)
            self._waiting.append(job)
            self._news.notify()

    def _run(self) -> None:
        while (new := self._new_jobs()) is not None:
            try:
                self._go_on(new)
            except Exception as error:  # such as logits that are not finite: the next may go well
                failed({*self._jobs, *new}, error)
                self._batch.keep([])
                self._jobs = []
        for job in (*self._jobs, *self._waiting):
            job.tell(stopping())

    def _new_jobs(self) -> list[Job] | None:
        """Requests that there is room for; waits if there is nothing to do. None to end."""
        with self._news:
            self._news.wait_for(lambda: self._jobs or self._waiting or self._is_stopped)
            if self._is_stopped:
                return None
            wanted = [job for job in self._waiting if job.is_wanted]
            new, self._waiting = wanted[: self._batch.n_free], wanted[self._batch.n_free :]
            return new

    def _go_on(self, new: list[Job]) -> None:
        wanted = [row for row, job in enumerate(self._jobs) if job.is_wanted]
        self._batch.keep(wanted)
        self._jobs = [self._jobs[row] for row in wanted]
        if new:
            try:
                self._batch.add([job.continuation for job in new])
                self._jobs += new
            except Exception as error:  # such as too little memory for a prompt: others go on
                failed(new, error)
        self._batch.step()
        for job in self._jobs:
            job.tell()
        self._jobs = [job for job in self._jobs if job.continuation.finish_reason is None]


def failed(jobs: Iterable[Job], error: Exception) -> None:
    """End requests that the model has failed at; why may name what is no client's business."""
    LOG.error("the model has failed", exc_info=error)
    for job in jobs:
        job.tell(Refusal("the model has failed; the server's log says why", status=500))


def stopping() -> Refusal:
    """The answer of a server that is being stopped."""
    return Refusal("the server is being stopped", status=503)


async def read_request(request: Request, name: str) -> dict[str, Any]:
    """The fields of a request, checked."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise Refusal(f"a request has at most {MOST_BYTES:,} bytes", status=413)
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the request is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise Refusal("the request must be a JSON object")
    fields = {field: value for field, value in given.items() if value is not None}
    for field, value in fields.items():
        if field not in FIELDS:
            raise Refusal(f"no field {field!r}; there are {', '.join(FIELDS)}", field)
        # In Python, true and false are whole numbers.
        if not isinstance(value, FIELDS[field]) or (
            isinstance(value, bool) and FIELDS[field] != (bool,)
        ):
            kinds = " or ".join(kind.__name__ for kind in FIELDS[field])
            raise Refusal(f"{field} must be {kinds}, got {value!r:.80}", field)
    if fields.get("model", name) != name:
        raise Refusal(f"no model {fields['model']!r:.80}; there is {name!r}", "model", 404)
    if fields.get("n", 1) != 1:
        raise Refusal("n must be 1: ask once for each text", "n")
    if "prompt" not in fields:
        raise Refusal("prompt is missing", "prompt")
    if not -(2**63) <= fields.get("seed", 0) < 2**63:
        raise Refusal("seed must have 64 bits or fewer", "seed")
    return fields


def continuation_of(model: SparseModel, fields: dict[str, Any]) -> Continuation:
    """The text that a request asks for."""
    names = ("temperature", "top_p", "top_k", "seed")
    options = {name: fields[name] for name in names if name in fields}
    options["stop"] = fields.get("stop") or []
    most, limit = fields.get("max_tokens", 16), model.context_length or MOST_TOKENS
    if not 1 <= most <= limit:
        raise Refusal(f"max_tokens must be from 1 to {limit}, got {most}", "max_tokens")
    if len(str(options["stop"])) > MOST_STOP_CHARACTERS:
        raise Refusal(f"stop must have at most {MOST_STOP_CHARACTERS:,} characters", "stop")
    try:
        continuation = Continuation(model, fields["prompt"], most, **options)
    except ValueError as error:
        named = (field for field in options if str(error).startswith(field))
        raise Refusal(str(error), next(named, "prompt")) from None
    if (n_tokens := continuation.n_prompt_tokens + most) > limit:
        raise Refusal(f"{n_tokens} tokens with the prompt, at most {limit}", "prompt")
    return continuation


class Events(StreamingResponse):
    """Pieces of a text as server-sent events."""

    def __init__(self, job: Job, answer: Callable[[str, str | None], dict[str, Any]]) -> None:
        super().__init__(self._events(), media_type="text/event-stream")
        self._job, self._answer = job, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them until they end or the client leaves, which may be before the first."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.is_wanted = False

    async def _events(self) -> AsyncIterator[str]:
        try:
            async for piece in self._job.pieces():
                if piece:
                    yield f"data: {json.dumps(self._answer(piece, None))}\n\n"
            last = self._answer("", self._job.continuation.finish_reason)
        except Refusal as refusal:  # the answer has begun, so its status is sent
            last = content_of(refusal)
        yield f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n"


def app_of(model: SparseModel, name: str = "sparse", max_waiting: int = 64) -> Starlette:
    """The application, for any ASGI server."""
    worker = Worker(model, max_waiting)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(worker.stop)

    async def complete(request: Request) -> Response:
        fields = await read_request(request, name)
        stops = fields.get("stop") or []
        # In a thread: the tokens of a long prompt take a while, and other requests go on.
        continuation = await asyncio.to_thread(continuation_of, model, fields)
        job = Job(continuation, [stops] if isinstance(stops, str) else stops)
        head: dict[str, Any] = {"id": f"cmpl-{uuid4().hex}"}
        head |= {"object": "text_completion", "created": int(time.time()), "model": name}

        def answer(text: str, reason: str | None) -> dict[str, Any]:
            choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
            return {**head, "choices": [choice]}

        worker.put(job)
        if fields.get("stream"):
            return Events(job, answer)
        text = ""
        try:
            async for piece in job.pieces():
                text += piece
                if await request.is_disconnected():
                    raise ClientDisconnect
        finally:
            job.is_wanted = False
        n_prompt, n_new = continuation.n_prompt_tokens, continuation.n_new_tokens
        usage = {"prompt_tokens": n_prompt, "completion_tokens": n_new}
        usage["total_tokens"] = n_prompt + n_new
        return JSONResponse({**answer(text, continuation.finish_reason), "usage": usage})

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"}]})

    app = Starlette(
        routes=[
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/v1/models", models),
        ],
        exception_handlers={
            Refusal: refused,
            HTTPException: no_such_place,
            ClientDisconnect: gone,
            Exception: broken,
        },
        lifespan=lifespan,
    )
    app.state.worker = worker
    return app


class Server(uvicorn.Server):
    """uvicorn, with an answer to requests that it would cut off when it is stopped."""

    def __init__(self, app: Starlette, **options: Any) -> None:
        seconds = SECONDS_TO_END + SECONDS_TO_ANSWER
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=seconds, **options))
        self._worker: Worker = app.state.worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for requests, some time for their texts and then for a refusal."""
        asyncio.get_running_loop().call_later(SECONDS_TO_END, self._worker.end)
        await super().shutdown(sockets)


def content_of(refusal: Refusal) -> dict[str, Any]:
    """An error as clients of OpenAI read it."""
    kind = "server_error" if refusal.status >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if refusal.status == 429 else kind
    return {"error": {"message": str(refusal), "type": kind, "param": refusal.field, "code": None}}


async def refused(request: Request, refusal: Exception) -> Response:
    """Why there is no text; clients of OpenAI try again after the seconds that it says."""
    assert isinstance(refusal, Refusal)
    headers = {"Retry-After": "1"} if refusal.status in (429, 503) else {}
    # Not a JSONResponse, which cannot send half of a surrogate pair: a field may be named so.
    content = json.dumps(content_of(refusal))
    return Response(content, refusal.status, headers, "application/json")


async def no_such_place(request: Request, error: Exception) -> Response:
    """What is not found, or not asked for in this way."""
    assert isinstance(error, HTTPException)
    answer = await refused(request, Refusal(error.detail, status=error.status_code))
    answer.headers.update(error.headers or {})  # such as which methods are allowed
    return answer


async def gone(request: Request, error: Exception) -> Response:
    """What nobody reads: the client left."""
    return Response(status_code=499)


async def broken(request: Request, error: Exception) -> Response:
    """A mistake in this file, which Starlette hands on to the server's log."""
    return await refused(request, Refusal("a fault; the server's log says why", status=500))


def main(
    artifact: str,
    name: str = "sparse",
    host: str = "127.0.0.1",
    port: int = 8000,
    max_waiting: int = 64,
    warm_up: bool = False,
) -> None:
    """Serve a sparse model.

    Args:
        artifact: directory of the sparse model.
        name: its name in requests.
        host: address to listen at; requests are not authenticated.
        port: port to listen at.
        max_waiting: most requests that wait for a place; others get status 429.
        warm_up: compile for all numbers of texts first, rather than beside the first requests.
    """
    if max_waiting < 1:
        raise SystemExit(f"max_waiting must be 1 or more, got {max_waiting}")
    model = load_sparse(artifact)
    if model.tokenizer is None:
        raise SystemExit(f"{artifact} has no tokenizer, so it continues no text")
    if warm_up:
        ContinuousBatch(model).warm_up()
    app = app_of(model, name, max_waiting)
    with suppress(KeyboardInterrupt):  # which uvicorn raises once more when it has ended
        Server(app, host=host, port=port).run()


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
