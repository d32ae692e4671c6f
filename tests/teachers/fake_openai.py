"""A server in this process that answers as vLLM or SGLang do, and can be told to misbehave.

vLLM's shape is that of 0.32, which test_openai_vllm.py starts. SGLang's is that of the sources of
0.5: `[None] + logprobs[:-1]` over `input_ids[logprob_start_len:]`.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

Fault = Callable[["Handler"], None]


class FakeServer(ThreadingHTTPServer):
    """``faults`` are the first answers to POSTs, ``change`` what becomes of the others."""

    daemon_threads = True

    def __init__(self, folder: Path, *, flavour: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.flavour = flavour
        self.cards: list[dict[str, Any]] = [
            {"id": "teacher", "owned_by": flavour, "max_model_len": 100}
        ]
        self.faults: deque[Fault] = deque()
        self.change: Callable[[dict[str, Any]], Any] = lambda answer: answer
        self.posts: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.arrivals_s: list[float] = []
        self.released = threading.Event()
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = body["prompt"] if self.flavour == "vllm" else body["input_ids"]
        with torch.inference_mode():
            logprobs = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return (vllm_answer if self.flavour == "vllm" else sglang_answer)(body, ids, logprobs)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        found = {"/v1/models": {"data": self.server.cards}, "/version": {"version": "fake"}}
        self.send(200 if self.path in found else 404, found.get(self.path, {}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server = self.server
        with server.lock:
            server.posts.append(body)
            server.headers.append(dict(self.headers))
            server.arrivals_s.append(time.monotonic())
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            fault = server.faults.popleft() if server.faults else None
            answer = None if fault else server.change(server.answer(body))
        if fault:
            fault(self)
        with server.lock:
            server.in_flight -= 1
        if answer is not None:
            self.send(200, answer)

    def send(self, status: int, content: Any, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(folder: Path, *, flavour: str) -> Iterator[FakeServer]:
    with FakeServer(folder, flavour=flavour) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


def says(status: int, message: str = "", **headers: str) -> Fault:
    return lambda handler: handler.send(status, {"error": {"message": message}}, **headers)


def hangs_up(handler: Handler) -> None:
    handler.close_connection = True


def hangs_up_halfway(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def says_nothing(handler: Handler) -> None:
    handler.server.released.wait()
    handler.close_connection = True


def vllm_answer(body: dict[str, Any], ids: list[int], logprobs: torch.Tensor) -> dict[str, Any]:
    rows: list[dict[str, Any] | None] = [None]
    for token, row in zip(ids[1:], logprobs[:-1], strict=True):
        rank = int((row >= row[token]).sum())
        entries = {str(token): {"logprob": float(row[token]), "rank": rank}}
        values, tops = row.topk(body["prompt_logprobs"])
        for place, (value, top) in enumerate(zip(values.tolist(), tops.tolist(), strict=True), 1):
            entries[str(top)] = {"logprob": value, "rank": place}
        rows.append(entries)
    return {"choices": [{"prompt_logprobs": rows}], "usage": {"prompt_tokens": len(ids)}}


def sglang_answer(body: dict[str, Any], ids: list[int], logprobs: torch.Tensor) -> dict[str, Any]:
    start, vocab_size = body["logprob_start_len"], logprobs.shape[1]
    own, tops = [], []
    for position in range(start, len(ids)):
        row, token = logprobs[position - 1], ids[position]
        values, ids_of = row.topk(body["top_logprobs_num"])
        pairs = zip(values.tolist(), ids_of.tolist(), strict=True)
        first = position == start
        reported = token if token < vocab_size - 1 else 0
        own.append([None if first else float(row[token]), reported, None])
        tops.append(None if first else [[value, top, None] for value, top in pairs])
    meta = {"prompt_tokens": len(ids), "input_token_logprobs": own, "input_top_logprobs": tops}
    return {"text": "", "meta_info": meta}
