"""The trainer on a real, very small Qwen3-VL: it learns, and resumes bit for bit."""

import json

import pytest
import torch

from safemed_bench.core.errors import UsageError
from safemed_bench.datasets.phantom import WORDS
from safemed_bench.models.card import card_from_folder
from safemed_bench.models.huggingface import HuggingFaceVLM
from safemed_bench.models.tiny import TAGS, build_tokenizer
from safemed_bench.training import train

CONFIG = """
name: trial
init: tiny
architecture: {hidden: 32, layers: 2, vision_hidden: 32, vision_layers: 2}
data: {name: phantom, images: 64, resolution: 64}
prompt: instruct
eval_questions: 16
eval_every: 8
log_every: 4
save_every: 3
stages:
  - {name: binding, steps: 4, batch_size: 8, tasks: [{kind: binding}, {kind: stated, prompts: [bare]}]}
  - name: mixed
    steps: 6
    batch_size: 8
    tasks:
      - {kind: answer, prompts: [instruct], letter_weight: 2}
      - {kind: rationale, prompts: [think_brief]}
"""


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFEMED_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "trial.yaml"
    path.write_text(CONFIG)
    return path


def _weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


class _StopError(Exception):
    pass


@pytest.mark.parametrize("stop_after", [3, 4, 7])  # inside a stage, at its end, inside the next one
def test_an_interrupted_run_ends_bit_equal(config, tmp_path, stop_after, monkeypatch):
    whole = train(config, (f"output={tmp_path / 'whole'}", "export_dtype=float32"), quiet=True)
    overrides = (f"output={tmp_path / 'cut'}", "export_dtype=float32")
    import safemed_bench.training.sft as sft

    update, calls = sft._update, iter(range(1, 100))

    def interrupted(*arguments):
        if next(calls) > stop_after:
            raise _StopError
        return update(*arguments)

    monkeypatch.setattr(sft, "_update", interrupted)
    with pytest.raises(_StopError):
        train(config, overrides, quiet=True)
    monkeypatch.setattr(sft, "_update", update)
    resumed = train(config, overrides, quiet=True)
    one, other = _weights(whole), _weights(resumed)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_the_entry_loads_and_says_how_it_was_made(config, tmp_path):
    folder = train(config, (f"output={tmp_path / 'out'}",), quiet=True)
    entry = json.loads((folder / "entry.json").read_text())
    assert entry["prompt"] == "instruct" and entry["training"]["stages"][1]["steps"] == 6
    card = card_from_folder("trial", folder)
    model = HuggingFaceVLM.load(card, (64, 64), device=torch.device("cpu"))
    assert model.fingerprint == card.fingerprint and not model.reasons
    assert _weights(folder)["model.visual.patch_embed.proj.weight"].dtype == torch.float16


def test_checkpoints_of_another_config_are_refused(config, tmp_path):
    out = f"output={tmp_path / 'out'}"
    train(config, (out,), quiet=True)
    with pytest.raises(UsageError, match="another config"):
        train(config, (out, "seed=1"), quiet=True)


def test_training_lowers_the_loss(config, tmp_path):
    out = tmp_path / "out"
    train(config, (f"output={out}", "stages.1.steps=40", "stages.1.learning_rate=0.003"), quiet=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/rationale_think_brief"] for line in lines if "loss/rationale_think_brief" in line]
    assert losses[-1] < 0.8 * losses[0]


def test_the_phantoms_words_are_single_tokens_and_any_text_can_be_asked():
    tokenizer = build_tokenizer(WORDS)
    for word in (w for w in WORDS if w[0].isalnum()):
        assert len(tokenizer.encode(f" {word}")) == 1, word
    for tag in TAGS:
        assert len(tokenizer.encode(tag)) == 1
    text = "Röntgen 3 µm — naïve 肺? <answer>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
