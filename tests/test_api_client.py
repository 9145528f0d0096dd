"""One request: what is tried again, what is given up, and what ends the run; against a real server on loopback."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from chat_server import HANG_UP, KEY, ChatServer, Fault

from safemed_bench.core.errors import AccessError, IncompleteError, ModelError
from safemed_bench.models import api_client
from safemed_bench.models.api import read_reply
from safemed_bench.models.api_calls import Calls, Reply
from safemed_bench.models.api_client import Client, RequestError
from safemed_bench.models.prompts import PROMPTS
from safemed_bench.suite.api import ApiSpec

VARIABLE = "SAFEMED_TEST_KEY"
GOOD = (200, {}, json.dumps({"choices": [{"message": {"content": "B"}, "finish_reason": "stop"}]}).encode())


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, KEY)
    monkeypatch.setattr(api_client, "PAUSE", 0.01)


def client(url: str, calls: Calls, **more: Any) -> Client:
    given = {"base_url": url, "model": "tiny", "key_env": VARIABLE, "retries": 2, "timeout": 5, **more}
    return Client(ApiSpec.model_validate(given), calls.under_way)


def asked(folder: Path, fault: Fault, **more: Any) -> tuple[ChatServer, Any]:
    """The server after one question, and the reply or what was raised."""
    with ChatServer(None, fault) as server:
        one = client(server.url, Calls(folder / "calls", None, 2), **more)
        try:
            return server, one.ask({"model": "tiny"}, lambda said: read_reply(said, PROMPTS["bare"]))
        except (ModelError, IncompleteError) as raised:
            return server, raised


def after(failures: int, wrong: tuple[int, dict[str, str], bytes]) -> Fault:
    return lambda number, _: wrong if number < failures else GOOD


def error(status: int, message: str, code: str = "", **headers: str) -> tuple[int, dict[str, str], bytes]:
    return status, headers, json.dumps({"error": {"message": message, "code": code}}).encode()


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 529])
def test_a_busy_or_broken_server_is_asked_again(tmp_path: Path, status: int) -> None:
    server, reply = asked(tmp_path, after(2, error(status, "busy")))
    assert reply == Reply("B", "stop") and len(server.bodies) == 3
    server, given_up = asked(tmp_path, after(9, error(status, "busy")))
    assert isinstance(given_up, RequestError) and len(server.bodies) == 3
    assert str(given_up) == f"no answer after 3 tries: HTTP {status}: busy"


def test_retry_after_is_kept_as_seconds_and_as_a_date(tmp_path: Path) -> None:
    server, reply = asked(tmp_path, after(1, error(429, "slow down", **{"Retry-After": "1"})))
    assert reply.text == "B" and 1.0 <= server.times[1] - server.times[0] < 3
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)  # whole seconds: at least one away
    server, reply = asked(tmp_path, after(1, error(503, "slow down", **{"Retry-After": soon})))
    assert reply.text == "B" and 0.5 <= server.times[1] - server.times[0] < 4


def test_a_server_that_asks_for_an_hour_ends_the_run(tmp_path: Path) -> None:
    server, ended = asked(tmp_path, after(1, error(429, "quota", **{"Retry-After": "3600"})))
    assert isinstance(ended, IncompleteError) and "asks to wait 3600 seconds" in str(ended) and len(server.bodies) == 1


def test_a_request_that_is_refused_is_not_repeated(tmp_path: Path) -> None:
    server, refused = asked(tmp_path, after(9, error(400, "image too small")))
    assert isinstance(refused, RequestError) and len(server.bodies) == 1
    assert str(refused) == "the server refuses this request (HTTP 400: image too small)"


@pytest.mark.parametrize("data", [b"<html>proxy</html>", b"[]", b'{"choices": []}', b'{"error": "overloaded"}', b""])
def test_a_reply_that_is_no_completion_is_no_answer(tmp_path: Path, data: bytes) -> None:
    server, broken = asked(tmp_path, after(9, (200, {}, data)))
    assert isinstance(broken, RequestError) and len(server.bodies) == 3 and "no chat completion" in str(broken)
    _, reply = asked(tmp_path, after(1, (200, {}, data)))
    assert reply.text == "B"


def test_a_reply_that_is_cut_off_or_does_not_come_is_no_answer(tmp_path: Path) -> None:
    for wrong in (HANG_UP, (200, {"Content-Length": "999"}, b"{")):
        server, broken = asked(tmp_path, after(9, wrong), timeout=1)
        assert isinstance(broken, RequestError) and len(server.bodies) == 3, broken

    def slow(number: int, body: dict[str, Any]) -> None:
        time.sleep(0.5)

    _, late = asked(tmp_path, slow, timeout=0.2, retries=0)
    assert isinstance(late, RequestError) and "after 1 try: nothing within 0.2 seconds" in str(late)


def test_an_account_without_money_ends_the_run(tmp_path: Path) -> None:
    for wrong in (error(429, "You exceeded your quota", "insufficient_quota"), error(402, "pay")):
        server, ended = asked(tmp_path, after(9, wrong))
        assert isinstance(ended, IncompleteError) and len(server.bodies) == 1


def test_nobody_at_the_address_ends_the_run(tmp_path: Path) -> None:
    with ChatServer(None) as server:
        pass
    with pytest.raises(IncompleteError, match="cannot be reached, after 3 tries: ConnectionRefusedError"):
        client(server.url, Calls(tmp_path / "calls", None, 2)).ask({}, dict)


def test_a_key_that_is_refused_ends_the_run_and_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "sk-another-secret")
    server, refused = asked(tmp_path, lambda *_: GOOD)
    assert isinstance(refused, AccessError) and not server.bodies
    assert f"refuses the key in ${VARIABLE} (HTTP 401: Incorrect API key provided: Bearer [key])" in str(refused)
    _, refused = asked(tmp_path, lambda *_: GOOD, key_env=None)
    assert isinstance(refused, AccessError) and "wants a key, which `key_env` names" in str(refused)
    for given, told in (("", "is not set"), ("sk-a\nbad-secret", "no key has"), ("sk-gehe\u00efm", "no key has")):
        monkeypatch.setenv(VARIABLE, given)
        with pytest.raises(ModelError, match=f"the environment variable {VARIABLE}, .* {told}") as raised:
            client(server.url, Calls(tmp_path / "calls", None, 2))
        assert not given or given not in str(raised.value)


def test_the_key_of_a_server_without_keys_may_be_a_word_of_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "B")
    with ChatServer(None, lambda *_: GOOD) as server:
        server.key = "B"
        one = client(server.url, Calls(tmp_path / "calls", None, 2))
        assert one.ask({}, lambda said: read_reply(said, PROMPTS["bare"])).text == "B"


def test_a_model_that_is_not_there_ends_the_run_but_one_refused_question_does_not(tmp_path: Path) -> None:
    for status in (403, 404):
        server, ended = asked(tmp_path, after(9, error(status, "no such model")))
        assert isinstance(ended, AccessError) and len(server.bodies) == 1
        replies = (GOOD, error(status, "flagged"))
        with ChatServer(None, lambda number, _, replies=replies: replies[number]) as server:
            one = client(server.url, Calls(tmp_path / "calls", None, 2))
            one.ask({}, dict)
            with pytest.raises(RequestError, match="flagged"):
                one.ask({}, dict)


def test_a_key_does_not_follow_to_another_address(tmp_path: Path) -> None:
    with ChatServer(None, lambda *_: GOOD) as other:
        there = {"Location": f"{other.url}/chat/completions"}
        for status in (301, 302, 307, 308):
            _, ended = asked(tmp_path, after(9, (status, there, b"")))
            assert isinstance(ended, AccessError) and other.url in str(ended)
    assert not other.bodies


def test_replies_are_shared_and_a_torn_line_is_no_reply(tmp_path: Path) -> None:
    one, other = (Calls(tmp_path / "calls", None, 1) for _ in range(2))
    assert one.held("a") is None
    one.keep("a", Reply("B", "stop", (-0.1, -2.0), "m"))
    assert other.held("a") == Reply("B", "stop", (-0.1, -2.0), "m")
    with (tmp_path / "calls" / "replies.jsonl").open("ab") as file:
        file.write(b'{"key": "torn", "te')
    other.keep("b", Reply("C", "length"))
    assert one.held("b") == Reply("C", "length") and one.held("torn") is None
    assert Calls(tmp_path / "calls", None, 1).held("a") == one.held("a")


def test_the_budget_is_of_all_workers_and_of_every_try(tmp_path: Path) -> None:
    with ChatServer(None, after(2, error(500, "busy"))) as server:
        for _ in range(2):
            client(server.url, Calls(tmp_path / "calls", 4, 2)).ask({}, dict)
        with pytest.raises(IncompleteError, match="4 requests were sent, and max_requests is 4"):
            client(server.url, Calls(tmp_path / "calls", 4, 2)).ask({}, dict)
        assert len(server.bodies) == 4
        client(server.url, Calls(tmp_path / "calls", 5, 2)).ask({}, dict)
        assert len(server.bodies) == 5


def test_so_many_requests_are_under_way_and_no_more(tmp_path: Path) -> None:
    """Two objects on one folder stand for two workers: the bound is on both together."""
    with ChatServer(None, lambda *_: GOOD, delay=0.05) as server:
        workers = [client(server.url, Calls(tmp_path / "calls", None, 3)) for _ in range(2)]
        threads = [Thread(target=workers[i % 2].ask, args=({"n": i}, dict)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(server.bodies) == 16 and server.most == 3


# -- what a reply says


def said(text: Any, **more: Any) -> dict[str, Any]:
    return {"model": "m-1", "choices": [{"message": {"content": text, **more}, "finish_reason": "stop"}]}


def test_a_rationale_that_is_kept_apart_is_put_back_where_it_is_asked_for() -> None:
    reply = said("<answer>B</answer>", reasoning_content="a cyst")
    assert read_reply(reply, PROMPTS["think"]).text == "<think>a cyst</think><answer>B</answer>"
    assert read_reply(reply, PROMPTS["instruct"]).text == "<answer>B</answer>"
    assert read_reply(said(None, refusal="I cannot help"), PROMPTS["bare"]).text == "I cannot help"
    assert read_reply(said("B"), PROMPTS["bare"]) == Reply("B", "stop", (), "m-1")
    with pytest.raises(ValueError, match="not text"):
        read_reply(said([{"type": "text"}]), PROMPTS["bare"])


def test_scores_are_read_where_the_letter_stands() -> None:
    def step(token: str, **top: float) -> dict[str, Any]:
        return {"token": token, "top_logprobs": [{"token": t.replace("_", ">"), "logprob": v} for t, v in top.items()]}

    reply = said("<answer>B</answer>")
    # as Qwen's tokenizer has it, the sign before the letter sticks to it
    steps = [step("<answer", x=-1.0), step(">B", _A=-2.0, _B=-0.2, _D=-3.0, q=-5.0), step("</answer>", x=0.0)]
    reply["choices"][0]["logprobs"] = {"content": steps}
    assert read_reply(reply, PROMPTS["instruct"]).letters == (-2.0, -0.2, -5.0, -3.0)
    for none in (None, {"content": None}, {"content": steps[:1]}, {"content": [{"token": "<answer>B"}]}):
        reply["choices"][0]["logprobs"] = none
        assert read_reply(reply, PROMPTS["instruct"]).letters == ()
