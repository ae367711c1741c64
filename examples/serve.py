"""A server that continues texts: `/v1/completions` as OpenAI has it, with streaming.

    pip install -e '.[serve]'
    python examples/serve.py --artifact sparse_model

Requests join the batch that is being decoded, up to 16 at a time, and leave it when they end.
"""

import asyncio
import json
import queue
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

from jsonargparse import auto_cli
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lightning_dsmoe import SparseModel, load_sparse
from lightning_dsmoe.inference.continuous_batch import MOST_TEXTS, Continuation, ContinuousBatch

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
MOST_TOKENS = 4096  # new ones, of a model without a context length
SECONDS_TO_END = 30  # that running requests have when the server is stopped


class BadRequest(Exception):
    """What is wrong with which field of a request."""

    def __init__(self, message: str, field: str | None, status: int = 400) -> None:
        super().__init__(message)
        self.field, self.status = field, status


class Job:
    """A request that waits for its text, in the event loop of the server."""

    def __init__(self, continuation: Continuation, stops: list[str]) -> None:
        self.continuation, self.stops = continuation, stops
        self.is_wanted = True
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Queue[tuple[str, bool] | Exception]()

    def tell(self, error: Exception | None = None) -> None:
        """Say from the thread of the model what the text is now, or that it failed."""
        text = shown(self.continuation, self.stops)
        has_ended = self.continuation.finish_reason is not None
        self._loop.call_soon_threadsafe(self._news.put_nowait, error or (text, has_ended))

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it grows, without the stop text that ends it."""
        sent, has_ended = 0, False
        try:
            while not has_ended:
                news = await self._news.get()
                if isinstance(news, Exception):
                    raise news
                text, has_ended = news
                yield text[sent:]
                sent = len(text)
        finally:
            self.is_wanted = False  # also where the client has gone


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
    """The thread in which the model runs."""

    def __init__(self, model: SparseModel) -> None:
        self._batch, self._jobs = ContinuousBatch(model), list[Job]()
        self._waiting = queue.SimpleQueue[Job | None]()
        self._thread, self._is_stopped = threading.Thread(target=self._run), False

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the token that it is at."""
        self._is_stopped = True
        self._waiting.put(None)  # which wakes it
        self._thread.join()

    def put(self, job: Job) -> None:
        """Let a request wait for its turn."""
        self._waiting.put(job)

    def _run(self) -> None:
        while (new := self._new_jobs()) is not None:
            try:
                self._go_on(new)
            except Exception as error:  # such as logits that are not finite: the next may go well
                for job in (*self._jobs, *new):
                    job.tell(error)
                self._batch.keep([])
                self._jobs = []

    def _new_jobs(self) -> list[Job] | None:
        """Requests that there is room for; waits if there is nothing to do. None to end."""
        new: list[Job] = []
        while len(new) < self._batch.n_free:
            try:
                job = self._waiting.get(block=not self._jobs and not new)
            except queue.Empty:
                break
            if job is not None and job.is_wanted:
                new.append(job)
            if self._is_stopped:
                break
        return None if self._is_stopped else new

    def _go_on(self, new: list[Job]) -> None:
        wanted = [row for row, job in enumerate(self._jobs) if job.is_wanted]
        self._batch.keep(wanted)
        self._jobs = [self._jobs[row] for row in wanted]
        if new:
            try:
                self._batch.add([job.continuation for job in new])
                self._jobs += new
            except Exception as error:  # such as too little memory for a prompt: others go on
                for job in new:
                    job.tell(error)
        self._batch.step()
        for job in self._jobs:
            job.tell()
        self._jobs = [job for job in self._jobs if job.continuation.finish_reason is None]


async def read_request(request: Request, name: str) -> dict[str, Any]:
    """The fields of a request, checked."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise BadRequest(f"a request has at most {MOST_BYTES:,} bytes", None, 413)
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the request is not JSON: {error}", None) from None
    if not isinstance(given, dict):
        raise BadRequest("the request must be a JSON object", None)
    fields = {field: value for field, value in given.items() if value is not None}
    for field, value in fields.items():
        if field not in FIELDS:
            raise BadRequest(f"no field {field!r}; there are {', '.join(FIELDS)}", field)
        # In Python, true and false are whole numbers.
        if not isinstance(value, FIELDS[field]) or (
            isinstance(value, bool) and FIELDS[field] != (bool,)
        ):
            kinds = " or ".join(kind.__name__ for kind in FIELDS[field])
            raise BadRequest(f"{field} must be {kinds}, got {value!r:.80}", field)
    if fields.get("model", name) != name:
        raise BadRequest(f"no model {fields['model']!r:.80}; there is {name!r}", "model", 404)
    if fields.get("n", 1) != 1:
        raise BadRequest("n must be 1: ask once for each text", "n")
    if "prompt" not in fields:
        raise BadRequest("prompt is missing", "prompt")
    if not -(2**63) <= fields.get("seed", 0) < 2**63:
        raise BadRequest("seed must have 64 bits or fewer", "seed")
    return fields


def job_of(model: SparseModel, fields: dict[str, Any]) -> Job:
    """The work that a request asks for."""
    options = {
        key: fields[key] for key in ("temperature", "top_p", "top_k", "seed") if key in fields
    }
    stop = fields.get("stop") or []
    most = fields.get("max_tokens", 16)
    if not 1 <= most <= (model.context_length or MOST_TOKENS):
        allowed = f"from 1 to {model.context_length or MOST_TOKENS}"
        raise BadRequest(f"max_tokens must be {allowed}, got {most}", "max_tokens")
    try:
        continuation = Continuation(model, fields["prompt"], most, stop=stop, **options)
    except ValueError as error:
        named = (field for field in (*options, "stop") if str(error).startswith(field))
        raise BadRequest(str(error), next(named, "prompt")) from None
    return Job(continuation, [stop] if isinstance(stop, str) else stop)


def app_of(model: SparseModel, name: str = "sparse") -> Starlette:
    """The application, for any ASGI server."""
    worker = Worker(model)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(worker.stop)

    def answer(identity: str, text: str, reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
        head = {"id": identity, "object": "text_completion", "created": int(time.time())}
        return {**head, "model": name, "choices": [choice]}

    async def complete(request: Request) -> Response:
        fields = await read_request(request, name)
        job, identity = job_of(model, fields), f"cmpl-{uuid4().hex}"
        worker.put(job)
        continuation = job.continuation
        if fields.get("stream"):
            return StreamingResponse(events(job, identity), media_type="text/event-stream")
        text = ""
        async for piece in job.pieces():
            text += piece
            if await request.is_disconnected():
                return Response(status_code=499)  # that nobody reads
        n_prompt, n_new = continuation.n_prompt_tokens, continuation.n_new_tokens
        usage = {"prompt_tokens": n_prompt, "completion_tokens": n_new}
        usage["total_tokens"] = n_prompt + n_new
        return JSONResponse({**answer(identity, text, continuation.finish_reason), "usage": usage})

    async def events(job: Job, identity: str) -> AsyncIterator[str]:
        try:
            async for piece in job.pieces():
                if piece:
                    yield f"data: {json.dumps(answer(identity, piece, None))}\n\n"
            last = answer(identity, "", job.continuation.finish_reason)
        except Exception as error:  # the answer has begun, so its status is sent
            last = content_of(error, None)
        yield f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n"

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"}]})

    return Starlette(
        routes=[
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/v1/models", models),
        ],
        exception_handlers={
            BadRequest: bad_request,
            HTTPException: no_such_place,
            Exception: failed,
        },
        lifespan=lifespan,
    )


def content_of(error: Exception, field: str | None, kind: str = "server_error") -> dict[str, Any]:
    """An error as clients of OpenAI read it."""
    return {"error": {"message": str(error), "type": kind, "param": field, "code": None}}


async def bad_request(request: Request, error: Exception) -> Response:
    """What is wrong with a request."""
    assert isinstance(error, BadRequest)
    content = content_of(error, error.field, "invalid_request_error")
    return JSONResponse(content, error.status)


async def no_such_place(request: Request, error: Exception) -> Response:
    """What is not found, or not asked for in this way."""
    assert isinstance(error, HTTPException)
    content = content_of(Exception(error.detail), None, "invalid_request_error")
    return JSONResponse(content, error.status_code)


async def failed(request: Request, error: Exception) -> Response:
    """What went wrong in the server."""
    return JSONResponse(content_of(error, None), 500)


def main(
    artifact: str,
    name: str = "sparse",
    host: str = "127.0.0.1",
    port: int = 8000,
    warm_up: bool = False,
) -> None:
    """Serve a sparse model.

    Args:
        artifact: directory of the sparse model.
        name: its name in requests.
        host: address to listen at; requests are not authenticated.
        port: port to listen at.
        warm_up: compile for all numbers of texts first, rather than beside the first requests.
    """
    import uvicorn

    model = load_sparse(artifact)
    if model.tokenizer is None:
        raise SystemExit(f"{artifact} has no tokenizer, so it continues no text")
    if warm_up:
        for n_texts in range(1, MOST_TEXTS + 1):
            model.warm_up(n_texts)
    uvicorn.run(app_of(model, name), host=host, port=port, timeout_graceful_shutdown=SECONDS_TO_END)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
