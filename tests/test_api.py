"""Entries that a server answers for: the same verdicts as of the same model here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from chat_server import KEY, ChatServer
from served_run import LOCAL, SIDE, SQUARE, here, records, remote, run, suite, surround, untold, verdict
from transformers.utils.import_utils import is_serve_available

from safemed_bench.core.errors import ModelError
from safemed_bench.core.types import Question
from safemed_bench.models import load_model
from safemed_bench.models.api import ApiVLM
from safemed_bench.models.huggingface import HuggingFaceVLM
from safemed_bench.run import probes
from safemed_bench.suite.schema import ModelSpec

PGD = {"attack": "pgd", "steps": 3, "models": ["local"]}
CERTIFY = {"certify": "cohen", "sigma": 0.1, "n": 12, "n0": 4, "per_modality": 1}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    surround(monkeypatch)


@pytest.fixture(scope="module")
def sft() -> HuggingFaceVLM:
    return here(LOCAL)


# -- the same verdicts


def test_a_served_model_is_judged_as_the_same_model_here(sft: HuggingFaceVLM, tmp_path: Path) -> None:
    cells = ["clean", "noise", "blank", "shuffled", {"corruption": ["jpeg"], "severities": [3]}]
    cells += [PGD, {**PGD, "transfer": "local", "models": ["remote"]}, SQUARE, CERTIFY]
    probes = {"level": "probe", "share": 0.5}
    with ChatServer(sft) as server:
        path = suite(tmp_path, [LOCAL, remote(server.url)], cells, diagnostics=probes)
        assert run(path, tmp_path / "run") == 0
    ours, there = records(tmp_path / "run", "local"), records(tmp_path / "run")
    kinds = {condition.partition("@")[0] for condition, _ in there}
    assert kinds >= {"clean", "noise", "blank", "shuffled", "corruption[jpeg]", "square", "certify[sigma=0.1]"}
    assert kinds >= {"probe:repeat", "probe:square"} and "probe:gradient" not in kinds
    for (condition, question), record in there.items():
        twin = ours[condition.replace("<-local", ""), question]
        assert verdict(record) == verdict(twin), (condition, question)
        assert "pgd" not in condition or record["linf"] <= 8 / 255 + 1e-9
    answers = {r["answer"] for r in there.values()}
    assert len(answers) > 2 and {r["correct"] for r in there.values()} == {True, False}, "a test that can fail"
    # what was sent: each picture as it is, settings as they stand, nothing twice but what a probe asks twice
    assert {image.shape for image in server.seen} == {(SIDE, SIDE, 3)}
    assert all(b["temperature"] == 0 and b["seed"] == 0 and b["max_tokens"] == 4 for b in server.bodies)
    distinct = len({json.dumps(body) for body in server.bodies})
    assert len(server.bodies) == distinct + 2, "two questions of the repeat probe were asked anew"
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert told["provenance"]["sessions"][-1]["served"] == {
        "remote": {"requests": len(server.bodies), "served": ["tiny fp1"]}
    }
    assert next(m for m in told["models"] if m["name"] == "remote")["api"]["base_url"] == server.url
    page = (tmp_path / "run" / "report.html").read_text()
    assert "which called it tiny fp1. The weights behind a server cannot be fingerprinted" in page
    untold(tmp_path / "run", KEY)


def test_a_served_model_that_reasons_is_read_as_strictly(tmp_path: Path) -> None:
    local = {"name": "local", "entry": "cot"}
    vlm = here(local)
    assert vlm.reasons
    with ChatServer(vlm) as server:
        own = {"prompt": vlm.card.prompt, "max_new_tokens": vlm.card.max_new_tokens}
        path = suite(tmp_path, [local, remote(server.url) | own], ["clean", "noise"])
        assert run(path, tmp_path / "run") == 0
    ours, theirs = records(tmp_path / "run", "local"), records(tmp_path / "run")
    assert {k: verdict(r) for k, r in theirs.items()} == {k: verdict(r) for k, r in ours.items()} and len(theirs) == 8
    assert all(r["text"].startswith("<think>") for r in theirs.values())


def test_workers_share_replies_and_the_bound_on_requests(sft: HuggingFaceVLM, tmp_path: Path) -> None:
    """Two workers want the same clean answers at the same time; the server is slow enough for both to see none."""
    two = {"workers": 2, "device": "cpu", "chunk": 4}
    with ChatServer(sft, delay=0.3) as server:
        path = suite(tmp_path, [remote(server.url, concurrency=3)], ["clean", SQUARE, "noise"], run=two)
        assert run(path, tmp_path / "run") == 0
        assert len({json.dumps(body) for body in server.bodies}) == len(server.bodies) and server.most == 3
    with ChatServer(sft, port=server.port) as alone:
        assert run(path, tmp_path / "alone", "--workers", "1") == 0
    assert len(alone.bodies) == len(server.bodies)
    both = [{k: verdict(r) for k, r in records(tmp_path / name).items()} for name in ("run", "alone")]
    assert both[0] == both[1] and len(both[0]) == 12


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A tiny LLaVA as `transformers serve` serves it, in a process of its own."""
    if not is_serve_available():
        pytest.skip("`transformers serve` needs fastapi, uvicorn and openai")
    folder = families.build("llava", tmp_path_factory.mktemp("llava"))
    with ChatServer(None) as free:
        port = str(free.port)
    program = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
    words = ["serve", str(folder), "--port", port, "--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"]
    log = (folder.parent / "serve.log").open("w")
    process = subprocess.Popen([*program, *words], stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 120
        while not _listens(url):
            assert process.poll() is None and time.monotonic() < until, Path(log.name).read_text()
            time.sleep(0.2)
        yield folder, f"{url}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


def _listens(url: str) -> bool:
    try:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/health", timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def test_transformers_serve_says_what_the_model_says_here(llava: tuple[Path, str], tmp_path: Path) -> None:
    """Another program, of strangers, on the same weights: every reply of every question is the same, word by word."""
    folder, url = llava
    local = {"name": "local", "path": str(folder), "decode": "generate", "max_new_tokens": 12, "prompt": "instruct"}
    there = {
        "name": "remote",
        "prompt": "instruct",
        "max_new_tokens": 12,
        "api": {"base_url": url, "model": str(folder)},
    }
    data = {"name": "phantom", "per_modality": 3, "resolution": 56, "filter": {"modality": ["CT", "OCT"]}}
    assert run(suite(tmp_path, [local, there], ["clean", "noise"], data=data), tmp_path / "run") == 0
    ours, theirs = records(tmp_path / "run", "local"), records(tmp_path / "run")
    assert len(theirs) == 12 and {key: verdict(r) for key, r in theirs.items()} == {
        k: verdict(r) for k, r in ours.items()
    }
    assert len({record["text"] for record in theirs.values()}) > 3, (
        "replies that differ, so that equality says something"
    )
    assert {record["status"] for record in theirs.values()} == {"truncated"}, "it spells no answer in 12 tokens"


# -- one entry by itself


def batch_of(vlm: Any, count: int = 4) -> Any:
    draw = torch.Generator().manual_seed(0)
    canvas = torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=draw, dtype=torch.uint8)
    options = ("cyst", "normal", "mass", "nodule")
    questions = [
        Question(f"q{i}", "", "", "What is it?", options[: 2 + i % 3], 0, "CT", "", "", "") for i in range(count)
    ]
    return vlm.prepare(questions, canvas)


def served(url: str, **more: Any) -> ApiVLM:
    vlm = load_model(ModelSpec.model_validate(remote(url, **more)), SIDE)
    assert isinstance(vlm, ApiVLM)
    return vlm


def test_a_reply_that_ran_into_its_limit_is_truncated(sft: HuggingFaceVLM) -> None:
    def cut(number: int, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        reply = {"choices": [{"message": {"content": "The B"}, "finish_reason": ("length", "stop")[number]}]}
        return 200, {}, json.dumps(reply).encode()

    with ChatServer(sft, cut) as server:
        vlm = served(server.url, concurrency=1)
        batch = batch_of(vlm, 2)
        assert [(a.index, a.status) for a in vlm.answer(batch, batch.pixels)] == [
            (None, "truncated"),
            (None, "invalid"),
        ]


def test_scores_are_those_of_the_model_where_the_server_shows_them(sft: HuggingFaceVLM) -> None:
    with ChatServer(sft) as server:
        vlm = served(server.url, logprobs=True)
        batch = batch_of(vlm)
        answers = vlm.answer(batch, batch.pixels)
    expected = sft.answer(sft.prepare(batch.questions, batch.canvas), batch.pixels)
    for answer, twin in zip(answers, expected, strict=True):
        assert (answer.index, answer.text, len(answer.option_logprobs)) == (
            twin.index,
            twin.text,
            len(twin.option_logprobs),
        )
        assert np.allclose(answer.option_logprobs, twin.option_logprobs, atol=1e-4)


def test_a_sampling_server_is_randomised_and_every_draw_has_its_seed(sft: HuggingFaceVLM) -> None:
    with ChatServer(sft) as server:
        vlm = served(server.url, temperature=0.7, seed=5)
        batch = batch_of(vlm, 1)
        for seed in (None, 1, 1, 2):
            stream = None if seed is None else torch.Generator().manual_seed(seed)
            vlm.answer(batch, batch.pixels, generator=stream)
        assert vlm.randomised and not served(server.url).randomised
    seeds = [body["seed"] for body in server.bodies]
    assert seeds[0] == 5 and len(seeds) == 3 and len(set(seeds)) == 3


def test_a_second_opinion_is_asked_for_and_not_kept() -> None:
    """What the repeat probe rests on: a server that changes its mind is seen to, and the first answer stays."""

    def fickle(number: int, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        return 200, {}, json.dumps({"choices": [{"message": {"content": "AB"[number % 2]}}]}).encode()

    with ChatServer(None, fickle) as server:
        vlm = served(server.url)
        batch = batch_of(vlm, 1)
        ((answer, extra),) = probes.repeat(vlm, batch)
        assert (answer.index, extra["again"]) == (0, 1)
        assert vlm.answer(batch, batch.pixels)[0].index == 0 and len(server.bodies) == 2


def test_noise_outside_the_range_is_shown_as_an_8_bit_image_ends(sft: HuggingFaceVLM) -> None:
    with ChatServer(sft) as server:
        vlm = served(server.url)
        batch = batch_of(vlm, 1)
        vlm.answer(batch, batch.pixels * 3 - 1)
    shown = ((batch.pixels * 3 - 1) * 255).round().clamp(0, 255)[0].permute(1, 2, 0).byte().numpy()
    assert np.array_equal(server.seen[0], shown)
    assert vlm.self_check(batch) == {"picture": 0}


def test_fields_can_be_left_out_and_others_put_in(sft: HuggingFaceVLM) -> None:
    with ChatServer(sft, lambda *_: (200, {}, b'{"choices": [{"message": {"content": "A"}}]}')) as server:
        blind = load_model(ModelSpec.model_validate(remote(server.url) | {"prompt": "blind"}), SIDE)
        batch = batch_of(blind, 1)
        blind.answer(batch, batch.pixels)
        assert [part["type"] for part in server.bodies.pop()["messages"][0]["content"]] == ["text"]
        vlm = served(server.url, omit=["temperature", "max_tokens"], body={"max_completion_tokens": 4})
        batch = batch_of(vlm, 1)
        vlm.answer(batch, batch.pixels)
    assert set(server.bodies[0]) == {"model", "messages", "seed", "max_completion_tokens"}


def test_what_a_server_does_not_show_is_refused_in_words() -> None:
    vlm = served("http://127.0.0.1:9/v1")
    batch = batch_of(vlm)
    for ask in (
        lambda: vlm.option_logits(batch, batch.pixels),
        lambda: vlm.token_loss(batch, batch.pixels, ["B"] * 4),
        lambda: vlm.next_token_logits(batch, batch.pixels, ["B"] * 4, torch.zeros(4, 1)),
        lambda: vlm.encode("B"),
        lambda: vlm.decode_text([1]),
    ):
        with pytest.raises(ModelError, match="neither gradients nor logits"):
            ask()


def test_the_fingerprint_is_of_all_that_changes_a_reply_and_of_nothing_else() -> None:
    def fingerprint(**more: Any) -> str:
        spec = remote("http://127.0.0.1:9/v1") | {k: v for k, v in more.items() if k in ("prompt", "max_new_tokens")}
        api = {k: v for k, v in more.items() if k not in spec or k == "model"}
        return served_card(spec | {"api": spec["api"] | api})

    def served_card(spec: dict[str, Any]) -> str:
        from safemed_bench.models.card import resolve

        return resolve(ModelSpec.model_validate(spec)).fingerprint

    same = {fingerprint(), fingerprint(timeout=9), fingerprint(concurrency=9), fingerprint(key_env="OTHER")}
    same |= {fingerprint(retries=9), fingerprint(max_requests=9)}
    others = [{"model": "large"}, {"base_url": "http://127.0.0.1:8/v1"}, {"prompt": "instruct"}, {"max_new_tokens": 5}]
    others += [{"temperature": 0.5}, {"seed": 1}, {"logprobs": True}, {"omit": ["seed"]}, {"body": {"top_p": 0.9}}]
    assert len(same) == 1 and len({fingerprint(**more) for more in others} - same) == len(others)
