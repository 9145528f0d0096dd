"""A real server of a real model on loopback: chat completions of a local entry, through the project's own adapter.

What goes wrong is asked of `fault`: a function of the request's number (from 0) and body that gives (status, headers,
bytes) instead of the model's answer, or `HANG_UP`, or None.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import numpy as np
import torch

from safemed_bench.core.types import Question
from safemed_bench.models.api import unpacked
from safemed_bench.models.base import Batch
from safemed_bench.models.huggingface import HuggingFaceVLM

KEY = "sk-test-3f9a1c77aa42"
HANG_UP = (0, {}, b"")
Fault = Callable[[int, dict[str, Any]], tuple[int, Mapping[str, str], bytes] | None]
ANYTHING = Question("", "", "", "", ("a", "b", "c", "d"), 0, "", "", "", "")


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # at the usual 5 a connection may wait a second to be taken


class ChatServer:
    """As a context manager it listens. `bodies`: every request that came, `seen` the (H, W, 3) pictures in them, `most`
    how many were under way at a time. port 0 takes a free one."""

    def __init__(
        self, vlm: HuggingFaceVLM | None, fault: Fault | None = None, *, port: int = 0, delay: float = 0
    ) -> None:
        self.vlm, self.fault, self.delay = vlm, fault, delay
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.seen: list[np.ndarray] = []
        self.under_way = self.most = 0
        self.key = KEY
        self._count, self._model = threading.Lock(), threading.Lock()
        self.http = Listener(("127.0.0.1", port), _handler(self))
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def die(self) -> None:
        """As a server that is killed: nobody listens any more. May be called while a request is answered."""
        threading.Thread(target=self.__exit__).start()

    def answer(self, headers: Mapping[str, str], body: dict[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        with self._count:
            number = len(self.bodies)
            self.bodies.append(body)
            self.headers.append(dict(headers))
            self.times.append(time.monotonic())
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        try:
            time.sleep(self.delay)
            wrong = self.fault(number, body) if self.fault else None
            return wrong or (200, {}, json.dumps(self.completion(body)).encode())
        finally:
            with self._count:
                self.under_way -= 1

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        """What the model says to this picture and this text."""
        parts = {part["type"]: part for part in body["messages"][0]["content"]}
        image = unpacked(parts["image_url"]["image_url"]["url"])
        self.seen.append(image)
        assert self.vlm is not None
        with self._model:
            canvas = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]
            batch = Batch((ANYTHING,), canvas, self.vlm.compose([parts["text"]["text"]]))
            (answer,) = self.vlm.answer(batch, batch.pixels)
            finish = "length" if len(answer.tokens) >= self.vlm.card.max_new_tokens else "stop"
            shown = {"logprobs": self._logprobs(batch, answer.tokens, body)} if body.get("logprobs") else {}
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text},
            "finish_reason": finish,
            **shown,
        }
        return {"object": "chat.completion", "model": body["model"], "system_fingerprint": "fp1", "choices": [choice]}

    def _logprobs(self, batch: Batch, tokens: tuple[int, ...], body: dict[str, Any]) -> dict[str, Any]:
        assert self.vlm is not None
        everything = torch.arange(len(self.vlm.tokenizer))[None]
        steps = []
        for place, token in enumerate(tokens):
            scores = self.vlm.next_token_logits(batch, batch.pixels, [tokens[:place]], everything)[0].detach()
            best = scores.topk(body["top_logprobs"]).indices.tolist()
            top = [{"token": self.vlm.decode_text([t]), "logprob": float(scores[t])} for t in best]
            own = {"token": self.vlm.decode_text([token]), "logprob": float(scores[token])}
            steps.append(own | {"top_logprobs": top})
        return {"content": steps}


def _handler(server: ChatServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.headers.get("Authorization") != f"Bearer {server.key}":
                # as a careless server does, with the key in its words
                told = f"Incorrect API key provided: {self.headers.get('Authorization')}"
                status, headers, data = 401, {}, json.dumps({"error": {"message": told}}).encode()
            elif self.path != "/v1/chat/completions":
                status, headers, data = 404, {}, b'{"detail": "Not Found"}'
            else:
                status, headers, data = server.answer(self.headers, body)
            if not status:
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(data)),
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    return Handler
