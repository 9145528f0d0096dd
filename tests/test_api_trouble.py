"""Runs of entries behind an API that meet trouble: what is missing, what stops, and what going on costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_server import HANG_UP, KEY, ChatServer
from served_run import LOCAL, SQUARE, VARIABLE, here, records, remote, run, suite, surround, untold, verdict

from safemed_bench.models.huggingface import HuggingFaceVLM


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    surround(monkeypatch)


@pytest.fixture(scope="module")
def sft() -> HuggingFaceVLM:
    return here(LOCAL)


def test_a_question_that_gets_no_answer_is_missing_and_no_other(sft: HuggingFaceVLM, tmp_path: Path) -> None:
    poison: list[str] = []

    def choosy(number: int, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes] | None:
        picture = body["messages"][0]["content"][0]["image_url"]["url"]
        poison[:] = poison or [picture]
        return (400, {}, b'{"error": {"message": "picture refused"}}') if picture == poison[0] else None

    with ChatServer(sft, choosy) as server:
        path = suite(tmp_path, [remote(server.url)], ["clean", "noise"])
        assert run(path, tmp_path / "run") == 3
        assert run(path, tmp_path / "run", "--fail-on-error", "0.2") == 0
        asked = len(server.bodies)
        server.fault = None
        assert run(path, tmp_path / "run", "--retry-errors") == 0
        assert len(server.bodies) == asked + 1, "only the one that had no answer is asked again"
    found = records(tmp_path / "run")
    assert len(found) == 8 and not any(record["error"] for record in found.values())
    first = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    (missing,) = [r for r in first if r["error"]]
    assert (
        "picture refused" in missing["error"] and missing["answer"] is missing["correct"] is missing["status"] is None
    )


def test_a_reply_that_is_not_json_is_missing_and_never_wrong(sft: HuggingFaceVLM, tmp_path: Path) -> None:
    with ChatServer(sft, lambda *_: (200, {}, b"<html>")) as server:
        assert run(suite(tmp_path, [remote(server.url, retries=0)], ["clean"]), tmp_path / "run") == 3
    found = records(tmp_path / "run").values()
    assert len(found) == 4 and all("no chat completion" in r["error"] and r["correct"] is None for r in found)


def test_a_server_that_dies_costs_nothing_that_was_answered(
    sft: HuggingFaceVLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def dying(number: int, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes] | None:
        if number < 6:
            return None
        server.die()
        return HANG_UP

    cells = ["clean", "noise", SQUARE]
    with ChatServer(sft, dying) as server:
        path = suite(tmp_path, [remote(server.url, concurrency=1)], cells)
        assert run(path, tmp_path / "run") == 3
    told = capsys.readouterr().err
    assert "cannot be reached" in told and "4 of 12 units are safe" in told and "go on with" in told
    assert len(records(tmp_path / "run")) == 4
    with ChatServer(sft, port=server.port) as back:
        assert run(path, tmp_path / "run") == 0
    with ChatServer(sft, port=server.port) as whole:
        assert run(path, tmp_path / "whole") == 0
    assert len(back.bodies) == len(whole.bodies) - 6, "the six that were answered are not asked again"
    stripped = [{k: verdict(r) for k, r in records(tmp_path / name).items()} for name in ("run", "whole")]
    assert stripped[0] == stripped[1] and len(stripped[0]) == 12


def test_a_key_that_is_refused_stops_the_run_and_is_nowhere(
    sft: HuggingFaceVLM, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, wrong := "sk-wrong-0b1e55")
    with ChatServer(sft) as server:
        assert run(suite(tmp_path, [remote(server.url)], ["clean", "noise"]), tmp_path / "run") == 2
    said = capfd.readouterr()
    assert f"refuses the key in ${VARIABLE} (HTTP 401" in said.err and wrong not in said.err + said.out
    untold(tmp_path / "run", wrong, KEY)
    monkeypatch.delenv(VARIABLE)
    with ChatServer(sft) as server:
        assert run(suite(tmp_path, [remote(server.url)], ["clean"]), tmp_path / "none") == 2
    assert f"environment variable {VARIABLE}" in capfd.readouterr().err and not server.bodies


def test_a_budget_ends_the_run_with_its_count_and_can_be_raised(
    sft: HuggingFaceVLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ChatServer(sft) as server:
        path = suite(tmp_path, [remote(server.url, max_requests=6, concurrency=2)], ["clean", "noise"])
        assert run(path, tmp_path / "run") == 3
        told = capsys.readouterr().err
        assert "6 requests were sent, and max_requests is 6" in told and "4 of 8 units are safe" in told
        assert len(server.bodies) == 6
        assert run(path, tmp_path / "run") == 3 and len(server.bodies) == 6, "sessions count together"
        assert run(path, tmp_path / "run", "--set", "models.0.api.max_requests=8") == 0
        assert len(server.bodies) == 8 and len(records(tmp_path / "run")) == 8
        assert run(path, tmp_path / "run", "--no-resume") == 3 and len(server.bodies) == 14, "a new run, asked anew"


def test_a_smoothed_entry_is_the_majority_of_its_replies(sft: HuggingFaceVLM, tmp_path: Path) -> None:
    smooth = {"smooth": {"sigma": 0.1, "n": 12}}
    with ChatServer(sft) as server:
        path = suite(tmp_path, [LOCAL | smooth, remote(server.url) | smooth], ["clean"])
        assert run(path, tmp_path / "run") == 0
    ours, theirs = records(tmp_path / "run", "local"), records(tmp_path / "run")
    assert {k: verdict(r) for k, r in theirs.items()} == {k: verdict(r) for k, r in ours.items()}
    assert len(server.bodies) == 4 * 12
