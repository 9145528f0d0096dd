"""A model that a server answers for (docs/api_models.md): only the deployed path, and nothing of what is inside.

The 8-bit canvas goes as a lossless PNG into a chat completion, with the suite's prompt; the reply's text goes through
the same strict extraction as that of a model that runs here. What a gradient is needed for is refused when a suite is
validated (suite/served.py).
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..core.errors import ModelError
from ..core.seeds import derive_seed
from ..core.types import LETTERS, Answer, Question
from .answers import extract, letter_place
from .api_calls import FOLDER, Calls, Reply
from .api_client import Client, RequestError
from .base import Batch, Decode, Text
from .card import ModelCard
from .prompts import Prompt, get_prompt

if TYPE_CHECKING:
    from ..suite.api import ApiSpec

TOP = 20
"""Alternatives asked for at each token, the protocol's most."""

CUT_OFF = "length"
"""finish_reason of a reply that ran into its token limit."""


class ApiVLM:
    """Implements models.base.VisionLanguageModel as far as answers go; all that is white-box raises ModelError.

    With a temperature above 0 it is `randomised`: an answer depends on the generator's initial seed. Raises ModelError
    where the key's environment variable is not set.
    """

    def __init__(self, card: ModelCard, api: ApiSpec, resolution: tuple[int, int]) -> None:
        self.name, self.reasons, self.fingerprint = card.name, card.reasons, card.fingerprint
        self.decode: Decode = "generate"
        self.resolution, self.device = resolution, torch.device("cpu")
        self.prompt, self._most, self.api = get_prompt(card.prompt), card.max_new_tokens, api
        self.randomised = api.temperature > 0
        self._home = tempfile.TemporaryDirectory(prefix="safemed-api-")  # until a run gives it a folder
        self._calls = Calls(Path(self._home.name) / "calls", api.max_requests, api.concurrency)
        self._client = Client(api, lambda: self._calls.under_way())
        self._hopeless: dict[str, str] = {}
        self._anew = False

    def keep_calls(self, run: Path, name: str) -> None:
        """Keep replies and counts in a run's folder, where all its workers share them; `name` is a file's name."""
        self._calls = Calls(run / FOLDER / name, self.api.max_requests, self.api.concurrency)

    def prepare(self, questions: Sequence[Question], canvas: Tensor) -> Batch:
        """Questions and their (B, 3, H, W) uint8 canvases to a batch."""
        if tuple(canvas.shape[-2:]) != self.resolution or canvas.dtype != torch.uint8:
            raise ValueError(f"canvas must be uint8 of {self.resolution}, not {canvas.dtype} {tuple(canvas.shape)}")
        return Batch(tuple(questions), canvas, {})

    def answer_prefix(self, rationale: str | None = None) -> str:
        """The continuation right before the letter."""
        return self.prompt.answer_prefix(rationale)

    # -- the deployed path ---------------------------------------------------------------------------------------

    def answer(self, batch: Batch, pixels: Tensor, *, generator: torch.Generator | None = None) -> list[Answer]:
        """8-bit image, request, strict extraction; what this run has asked already is not asked again.

        option_logprobs: with `logprobs` those of the letters where the answer's letter stands; one that is not among
        the server's TOP alternatives gets the smallest of these, which bounds it from above. Raises RequestError where
        a request fails for good, after all others are answered; AccessError and IncompleteError at once.
        """
        images = (pixels.detach() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        seed = self.api.seed
        if self.randomised and generator is not None:
            seed = derive_seed(seed, generator.initial_seed()) % 2**31
        bodies = [self._body(q, image, seed) for q, image in zip(batch.questions, images, strict=True)]
        keys = [_digest(self.api.base_url, body) for body in bodies]
        wanted = dict(zip(keys, bodies, strict=True))
        replies = {} if self._anew else {key: reply for key in wanted if (reply := self._calls.held(key))}
        replies |= self._ask({key: body for key, body in wanted.items() if key not in replies})
        return [self._read(replies[key], q) for key, q in zip(keys, batch.questions, strict=True)]

    @contextmanager
    def asked_anew(self) -> Iterator[None]:
        """Inside, answers are asked for again, and not kept: does the server say the same twice?"""
        self._anew = True
        try:
            yield
        finally:
            self._anew = False

    def _body(self, question: Question, image: NDArray[np.uint8], seed: int) -> dict[str, Any]:
        """The request, without fields that the suite leaves out."""
        text: dict[str, Any] = {"type": "text", "text": self.prompt.user_text(question)}
        shown = [{"type": "image_url", "image_url": {"url": data_url(image)}}] if self.prompt.image else []
        body = {
            "model": self.api.model,
            "messages": [{"role": "user", "content": [*shown, text]}],
            "temperature": self.api.temperature,
            "seed": seed,
            "max_tokens": self._most,
        }
        body |= {"logprobs": True, "top_logprobs": TOP} if self.api.logprobs else {}
        return {key: value for key, value in body.items() if key not in self.api.omit} | self.api.body

    def _ask(self, bodies: Mapping[str, dict[str, Any]]) -> dict[str, Reply]:
        """The replies to requests, a few at a time. One that fails for good does not keep the others from being asked:
        their replies are kept for the next try."""
        failed: list[RequestError] = []
        replies: dict[str, Reply] = {}

        def ask(key: str) -> None:
            try:
                replies[key] = self._told_anew(bodies[key]) if self._anew else self._told(key, bodies[key])
            except RequestError as error:
                self._hopeless[key] = str(error)
                failed.append(error)

        with ThreadPoolExecutor(self.api.concurrency) as pool:
            running: list[Future[None]] = [pool.submit(ask, key) for key in bodies]
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
            if fatal := next((f.exception() for f in done if f.exception()), None):
                pool.shutdown(cancel_futures=True)
                raise fatal
        if failed:
            raise failed[0]
        return replies

    def _told(self, key: str, body: dict[str, Any]) -> Reply:
        """The reply to one request, from the server or from the worker that asked it meanwhile."""
        if key in self._hopeless:
            raise RequestError(self._hopeless[key])
        with self._calls.claimed(key) as held:
            if held:
                return held
            reply = self._told_anew(body)
            self._calls.keep(key, reply)
            return reply

    def _told_anew(self, body: dict[str, Any]) -> Reply:
        return self._client.ask(body, lambda said: read_reply(said, self.prompt))

    def _read(self, reply: Reply, question: Question) -> Answer:
        count = len(question.options)
        index, status = extract(reply.text, self.prompt, count, finished=reply.finish != CUT_OFF)
        return Answer(index, status, reply.text, reply.letters[:count], letter=index)

    def self_check(self, batch: Batch) -> dict[str, Any]:
        """That a picture arrives as it is: the largest difference, in levels, after it was packed; must be 0. Asks
        nothing of the server. Raises ModelError."""
        images = batch.canvas.permute(0, 2, 3, 1).cpu().numpy()
        apart = max((int(np.abs(unpacked(data_url(im)).astype(int) - im).max()) for im in images), default=0)
        if apart:
            raise ModelError(f"model '{self.name}': a picture changes by up to {apart} levels on its way")
        return {"picture": apart}

    # -- what a server does not show -----------------------------------------------------------------------------

    def _closed(self, *_: object) -> NoReturn:
        raise ModelError(
            f"model '{self.name}' is answered by a server, which shows neither gradients nor logits nor tokens"
        )

    def encode(self, text: str) -> tuple[int, ...]:
        self._closed()

    def decode_text(self, tokens: Sequence[int]) -> str:
        self._closed()

    def next_token_logits(self, batch: Batch, pixels: Tensor, text: Sequence[Text], candidates: Tensor) -> Tensor:
        self._closed()

    def option_logits(self, batch: Batch, pixels: Tensor, text: Sequence[Text] | None = None) -> Tensor:
        self._closed()

    def token_loss(
        self, batch: Batch, pixels: Tensor, text: Sequence[Text], weights: Sequence[Sequence[float]] | None = None
    ) -> Tensor:
        self._closed()


def data_url(image: NDArray[np.uint8]) -> str:
    """An (H, W, 3) picture as a PNG, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)  # higher ones take twice as long for a tenth
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def unpacked(url: str) -> NDArray[np.uint8]:
    """The (H, W, 3) picture of a `data_url`."""
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as picture:
        return np.asarray(picture.convert("RGB"))


def _digest(address: str, body: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps([address, body], sort_keys=True).encode(), digest_size=16).hexdigest()


def read_reply(said: Any, prompt: Prompt) -> Reply:
    """The first choice of a chat completion. Raises ValueError where there is none.

    A rationale that the server keeps apart (`reasoning_content`) is put back before the answer where the prompt asks
    for one. Without a text, its refusal is the text.
    """
    try:
        choice = said["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text = message.get("content") or message.get("refusal") or ""
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError("it has no choice with a message") from error
    if not isinstance(text, str):
        raise ValueError("the message's content is not text")
    aside = message.get("reasoning_content") or message.get("reasoning")
    letters = _letters(choice.get("logprobs"), text, prompt)
    if prompt.reasons and isinstance(aside, str):
        text = f"<think>{aside}</think>{text}"
    served = " ".join(str(said[key]) for key in ("model", "system_fingerprint") if said.get(key))
    return Reply(text, str(finish or ""), letters, served)


def _letters(logprobs: Any, text: str, prompt: Prompt) -> tuple[float, ...]:
    """Of A to D, the log-probability of the token that would put it where the reply's letter stands; () where the
    server tells none. A letter may share its token with what is around it."""
    place = letter_place(text, prompt)
    if place is None:
        return ()
    try:
        start = 0
        for step in logprobs["content"]:
            token = str(step["token"])
            if start <= place < start + len(token) and text.startswith(token, start):
                known = {str(other["token"]): float(other["logprob"]) for other in step["top_logprobs"]}
                head, tail = token[: place - start], token[place - start + 1 :]
                return tuple(known.get(head + letter + tail, min(known.values())) for letter in LETTERS)
            start += len(token)
    except (KeyError, TypeError, ValueError):  # no log-probabilities, or of another form
        pass
    return ()
