"""An entry that a server answers for, over the OpenAI-compatible protocol: what a suite says of it."""

from __future__ import annotations

import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from .condition import Part
from .values import Count, Number, Text, Whole

OURS = ("model", "messages", "stream", "n", "logprobs", "top_logprobs")
"""Fields of a request that `body` may not set."""

Omittable = Literal["temperature", "seed", "max_tokens"]


class ApiSpec(Part):
    """A model behind `POST base_url/chat/completions`. It shows answers: no gradient, and no weights to fingerprint."""

    base_url: Text = Field(description="Address of the server, up to and with `/v1`.")
    model: Text = Field(description="What the server calls the model.")
    key_env: Text | None = Field(
        default=None, description="Environment variable that holds the key; None sends no key. Never the key itself."
    )
    concurrency: Count = Field(default=4, description="Requests under way at a time, over all workers of a machine.")
    timeout: Number = Field(default=60, gt=0, description="Patience with one request, seconds.")
    retries: Whole = Field(
        default=5, description="Further tries of a request that met a busy or broken server, with growing pauses."
    )
    max_requests: Count | None = Field(
        default=None,
        description="Requests that a run may send in all, tries and sessions together; then it stops with exit code 3.",
    )
    temperature: Number = Field(
        default=0.0, ge=0, le=2, description="Of the server's sampling; above 0 the entry counts as randomised."
    )
    seed: Whole = Field(default=0, description="Of the server's sampling, where it has one.")
    logprobs: bool = Field(
        default=False, description="Ask for log-probabilities and read the options' scores from them, for Square."
    )
    omit: tuple[Omittable, ...] = Field(
        default=(), description="Fields of the request that this server refuses, and is not sent."
    )
    body: dict[str, Any] = Field(
        default_factory=dict, description="Further fields of each request, such as `{top_p: 1}`; they are stored."
    )

    @field_validator("base_url")
    @classmethod
    def _an_address(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            known = False
        if not known:
            raise ValueError("must be an address such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "must hold no name, password or query, since it is stored; a key goes by `key_env`, the name of an "
                "environment variable"
            )
        if parts.path.rstrip("/").endswith("/chat/completions"):
            raise ValueError("ends before `/chat/completions`, usually with `/v1`")
        return value.rstrip("/")

    @field_validator("key_env")
    @classmethod
    def _a_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", value):
            raise ValueError("must be the name of an environment variable, such as OPENAI_API_KEY, not the key itself")
        return value

    @field_validator("body")
    @classmethod
    def _not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := [key for key in OURS if key in value]:
            raise ValueError(f"{', '.join(taken)} cannot be set here: it is what the run itself decides")
        return value
