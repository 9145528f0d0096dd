"""What a suite may ask of an entry behind an API, what is refused, and how many requests are foreseen."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from chat_server import KEY

from safemed_bench import cli
from safemed_bench.attacks import ATTACKS, black_box
from safemed_bench.core import registry
from safemed_bench.core.errors import SuiteError
from safemed_bench.suite import dump_suite, load_suite

API = {"base_url": "http://127.0.0.1:9/v1", "model": "m", "key_env": "SAFEMED_TEST_KEY"}
VERDICTS = {"attack": "square", "params": {"feedback": "verdict", "queries": 10}}


def entry(**more: Any) -> dict[str, Any]:
    return {"name": "gpt", "prompt": "bare", "api": API | more}


def written(folder: Path, models: list[Any], conditions: list[Any], **more: Any) -> Path:
    data = {"name": "phantom", "per_modality": 2, "filter": {"modality": ["CT", "OCT"]}}
    body = {"name": "s", "data": data, "models": models, "conditions": conditions, **more}
    path = folder / "s.yaml"
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return path


def problem(path: Path) -> tuple[str, str]:
    with pytest.raises(SuiteError) as raised:
        load_suite(path)
    (found,) = raised.value.problems
    assert found.file == str(path) and found.line, "it says where"
    return found.key, found.message


@pytest.mark.parametrize("attack", [name for name in ATTACKS if not black_box(name)])
def test_an_attack_that_needs_gradients_is_refused_and_told_what_works(tmp_path: Path, attack: str) -> None:
    condition = {"attack": attack} | ({"params": {"sigma": 0.25}} if ATTACKS[attack].needs_sigma else {})
    key, message = problem(
        written(tmp_path, ["sft", entry()], ["clean", condition], threat={"norm": "l2", "eps": [0.5]})
    )
    assert key == "conditions.1.attack" and f"'{attack}' needs gradients or logits" in message
    for instead in ("`models: [sft]`", "`transfer: sft`", "`params: {feedback: verdict}`", "external"):
        assert instead in message
    load_suite(written(tmp_path, ["sft", entry()], ["clean", condition | {"models": ["sft"]}]))


def test_what_cannot_be_made_against_an_api_cannot_be_transferred_from_it(tmp_path: Path) -> None:
    shown = {"attack": "pgd", "steps": 2, "transfer": "gpt"}
    key, message = problem(written(tmp_path, ["sft", entry()], ["clean", shown]))
    assert key == "conditions.1.transfer" and "`transfer: sft`" in message
    load_suite(
        written(tmp_path, ["sft", entry()], ["clean", shown | {"transfer": "sft"}, VERDICTS | {"transfer": "gpt"}])
    )


def test_alone_it_is_told_of_what_works_without_another_entry(tmp_path: Path) -> None:
    _, message = problem(written(tmp_path, [entry()], ["clean", {"attack": "safemed-attack"}]))
    assert "transfer" not in message and "corruptions, noise, blank" in message


def test_a_black_box_that_climbs_scores_needs_a_server_that_shows_them(tmp_path: Path) -> None:
    key, message = problem(written(tmp_path, [entry()], ["clean", {"attack": "square"}]))
    assert key == "conditions.1.attack" and "`params: {feedback: verdict}`" in message and "`logprobs: true`" in message
    scores = {"attack": "square", "params": {"feedback": "scores"}}
    assert problem(written(tmp_path, [entry()], ["clean", scores]))[0] == "conditions.1.params.feedback"
    assert "Use `square`" in problem(written(tmp_path, [entry()], ["clean", {"attack": "art:Square"}]))[1]
    for condition in (VERDICTS, {"certify": "cohen", "sigma": 0.25}, {"corruption": "all"}):
        load_suite(written(tmp_path, [entry()], ["clean", condition]))
    load_suite(written(tmp_path, [entry(logprobs=True)], ["clean", scores]))


def test_a_smoothed_entry_behind_an_api_is_one_too(tmp_path: Path) -> None:
    smooth = entry() | {"smooth": {"sigma": 0.25}}
    condition = {"attack": "pgd", "steps": 2, "models": "smoothed"}
    assert "needs gradients" in problem(written(tmp_path, ["sft", smooth], ["clean", condition]))[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_url": "127.0.0.1:8000"}, "must be an address such as"),
        ({"base_url": f"https://me:{KEY}@host/v1"}, "must hold no name, password or query"),
        ({"base_url": "https://host/v1/chat/completions"}, "ends before `/chat/completions`"),
        ({"key_env": KEY}, "not the key itself"),
        ({"body": {"messages": []}}, "messages cannot be set here"),
        ({"concurrency": 0}, "greater than or equal to 1"),
        ({"omit": ["temperatur"]}, "Did you mean 'temperature'?"),
        ({"max_request": 5}, "Did you mean 'max_requests'?"),
    ],
)
def test_a_wrong_setting_is_told_without_what_may_be_a_key(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    _, told = problem(written(tmp_path, [entry(**change)], ["clean"]))
    assert message in told and KEY not in told


@pytest.mark.parametrize(
    "more", [{"path": "/w"}, {"entry": "sft"}, {"adapter": "/a"}, {"dtype": "bf16"}, {"quantize": "nf4"}]
)
def test_what_has_no_effect_on_a_server_is_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    _, told = problem(written(tmp_path, [entry() | more], ["clean"]))
    assert f"`{next(iter(more))}` would have no effect" in told
    assert "answers by text" in problem(written(tmp_path, [entry() | {"decode": "logprob"}], ["clean"]))[1]


def test_a_suite_comes_back_as_it_was(tmp_path: Path) -> None:
    suite = load_suite(written(tmp_path, [entry(omit=["seed"], body={"top_p": 0.5}, temperature=0.5)], ["clean"]))
    again = tmp_path / "again.yaml"
    again.write_text(dump_suite(suite))
    assert load_suite(again) == suite


def test_the_plan_foresees_the_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = ["clean", "noise", VERDICTS, {"certify": "cohen", "sigma": 0.25, "n": 50, "n0": 10}]
    threat = {"threat": {"eps": ["4/255", "8/255"]}}
    path = written(tmp_path, ["sft", entry(max_requests=300)], cells, **threat)
    assert cli.invoke(["plan", str(path), "--output", str(tmp_path / "run"), "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    # 4 questions: clean, noise at two eps, 10 queries at two eps, 60 samples
    expected = 4 * (1 + 2 + 2 * 10 + 60)
    assert plan["requests"] == {"gpt": {"most": expected, "unknown": [], "limit": 300, "sent": 0}}
    served, attacked = [text for text in plan["notes"] if text.startswith("gpt")]
    assert "cannot be fingerprinted: at most 332 requests; the run stops at max_requests = 300" in served
    assert "its worst case is no match" in attacked
    assert cli.invoke(["plan", str(path), "--output", str(tmp_path / "run")]) == 0
    assert "gpt: at most 332 requests (max_requests 300), 0 sent" in capsys.readouterr().out


def test_each_answer_of_a_smoothed_or_sampling_entry_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def most(**more: Any) -> int:
        cells = [VERDICTS]  # without clean cells, the clean answers are asked for the attack
        assert cli.invoke(["plan", str(written(tmp_path, [entry() | more], cells)), "--json"]) == 0
        return int(json.loads(capsys.readouterr().out)["plans"][0]["requests"]["gpt"]["most"])

    assert most() == 4 * (1 + 3 * 10)
    assert most(smooth={"sigma": 0.25, "n": 20}) == 4 * 20 * (1 + 3 * (3 * 10 + 3))
    assert most(api=API | {"temperature": 1}) == 4 * (1 + 3 * (3 * 10 + 3))


def test_a_plugins_black_box_works_and_its_requests_are_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Blind:
        name, needs_objective = "blind-search", False

    class Climber(Blind):
        needs_objective = True

    path = written(tmp_path, ["sft", entry()], ["clean", {"attack": "blind-search"}])
    monkeypatch.setitem(registry.attacks._items, "blind-search", Climber)
    assert "needs gradients or logits" in problem(path)[1]
    monkeypatch.setitem(registry.attacks._items, "blind-search", Blind)
    assert cli.invoke(["plan", str(path), "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    assert plan["requests"]["gpt"]["most"] == 4 and len(plan["requests"]["gpt"]["unknown"]) == 3
    assert any("beside what blind-search@linf:2/255, " in note for note in plan["notes"])


@pytest.mark.parametrize("name", [n for n in ATTACKS if ATTACKS[n].queries > 1])
def test_the_catalogue_knows_how_often_a_black_box_asks(name: str) -> None:
    assert inspect.signature(registry.attacks.get(name)).parameters["queries"].default == ATTACKS[name].queries
