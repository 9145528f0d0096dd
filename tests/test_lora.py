"""Training with a LoRA adapter: what is trained, in which precision, and what the finished entry holds."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_at_grpo import CONFIG

from safemed_bench.datasets.phantom import WORDS
from safemed_bench.models import tiny
from safemed_bench.models.card import card_from_folder
from safemed_bench.models.huggingface import HuggingFaceVLM
from safemed_bench.training import train
from safemed_bench.training.checkpoint import load_start
from safemed_bench.training.config import load_config

pytest.importorskip("peft")
SIZES = {"hidden": 32, "layers": 2, "vision_hidden": 32, "vision_layers": 2}


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """accelerate keeps the first precision of a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def start(tmp_path):
    """Weights as the Hub's large models have them, in bfloat16."""
    words = [w for w in WORDS if w.isalpha() and len(w) > 1]
    model, processor = tiny.build(words, **SIZES)
    tiny.save(model.to(torch.bfloat16), processor, tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def config(tmp_path, start):
    path = tmp_path / "trial.yaml"
    path.write_text(CONFIG)
    return path, ("architecture={}", f"init={start}", "lora.rank=2", f"output={tmp_path / 'out'}")


@pytest.mark.parametrize("bf16", [True, False])
def test_frozen_weights_stay_as_they_were_saved_and_adapters_are_float32(config, bf16):
    path, overrides = config
    vlm = load_start(load_config(path, overrides), (), torch.device("cpu"), bf16=bf16)
    frozen = {p.dtype for p in vlm.model.parameters() if not p.requires_grad}
    trained = {name: p.dtype for name, p in vlm.model.named_parameters() if p.requires_grad}
    assert frozen == {torch.bfloat16 if bf16 else torch.float32}
    assert set(trained.values()) == {torch.float32} and all("lora" in name for name in trained)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_both_stages_train_the_adapter_and_the_entry_holds_its_update(config, start, precision):
    """Adversarial SFT and AT-GRPO; an update is below what bfloat16 resolves, and is there all the same."""
    path, overrides = config
    entry = train(path, (*overrides, f"precision={precision}"), quiet=True)
    before, after = load_file(start / "model.safetensors"), load_file(entry / "model.safetensors")
    assert before.keys() == after.keys(), "merged: no adapter is left"
    moved = [name for name in before if not torch.equal(after[name], before[name].float())]
    assert any("language_model" in name for name in moved) and not any("embed_tokens" in name for name in moved)
    fine = [name for name in moved if not torch.equal(after[name], after[name].bfloat16().float())]
    assert fine == moved, "added in float32, not rounded to the grid of the start"
    vlm = HuggingFaceVLM.load(card_from_folder("trial", entry), (64, 64), device=torch.device("cpu"))
    assert vlm.prompt.name == "bare"
