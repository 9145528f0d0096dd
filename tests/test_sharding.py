"""Training on several processes as documented: the files in docs/configs are launched, on CPUs and gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from safetensors.torch import load_file

from safemed_bench.core.errors import UsageError
from safemed_bench.models.card import card_from_folder
from safemed_bench.models.huggingface import HuggingFaceVLM
from safemed_bench.models.selfcheck import probe_batch
from safemed_bench.training import sharding, train

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "docs" / "configs"
MODEL = "architecture: {hidden: 32, layers: 2, vision_hidden: 32, vision_layers: 2}"
CONFIG = f"""
name: trial
init: tiny
{MODEL}
data: {{name: phantom, images: 64, resolution: 64}}
prompt: bare
max_new_tokens: 6
eval_questions: 8
eval_every: 3
log_every: 1
save_every: 1
export_dtype: float32
stages:
  - name: taught
    steps: 1
    batch_size: 4
    warmup: 0
    adversary: {{eps: 4/255, share: 0.25, detect_every: 1}}  # a quarter of four: one of two processes attacks nothing
    tasks: [{{kind: answer, prompts: [bare]}}]
  - name: rewarded
    steps: 2
    batch_size: 4
    adversary: {{eps: 4/255, steps: 2, rel_step: 0.75}}
    grpo: {{group_size: 4, beta: 0.1, loss: dapo, consistency: 0.1, micro_batch: 1}}
    tasks: [{{kind: answer, prompts: [bare]}}]
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "trial.yaml"
    path.write_text(CONFIG)
    return path


def _run(*command):
    paths = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def _launch(kind, *command):
    """Two processes by a documented file: `main_process_port` 0 is any that is free."""
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{kind}.yaml"))
    _run(*launcher, "--num_processes", "2", "--main_process_port", "0", *command)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_launched_processes_give_the_gradients_of_one(kind, path, tmp_path):
    """Of an adversarial SFT step in which one process attacks nothing, and of an AT-GRPO step with rollouts that end at
    different lengths (`ranks.py`): ranks that did not wait for each other would hang."""
    script = str(ROOT / "tests" / "ranks.py")
    _run(script, str(path), str(tmp_path / "one"))
    _launch(kind, script, str(path), str(tmp_path / "two"))
    one, two = (torch.load(tmp_path / name) for name in ("one", "two"))
    assert (two["processes"], two["sharded"]) == (2, kind == "fsdp")
    assert two["held"] == one["held"] // (2 if kind == "fsdp" else 1)
    first, second = ([max(row[:2]) for row in rows] for rows in (two["lengths"][:2], two["lengths"][2:]))
    assert max(first) != max(second), "both processes' clean rollouts end at once: nothing is tried"
    for step in ("sft", "at_grpo"):
        mine, theirs = one[step], two[step]
        largest = max(float(g.abs().max()) for g in mine.values())
        assert mine.keys() == theirs.keys() and largest > 1e-3
        assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-5 * max(1.0, largest)


def _answers(folder):
    vlm = HuggingFaceVLM.load(card_from_folder("trial", folder), (64, 64), device=torch.device("cpu"))
    batch = probe_batch(vlm)
    return vlm.answer(batch, batch.pixels)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_a_run_in_shards_is_that_of_one_process_and_resumes(lora, path, tmp_path):
    if lora:
        pytest.importorskip("peft")
        start = train(path, (f"output={tmp_path / 'start'}", "stages.1.steps=1", "eval_questions=0"), quiet=True)
        path.write_text(CONFIG.replace("init: tiny", f"init: {start}\nlora: {{rank: 4}}").replace(MODEL, ""))
    whole = train(path, (f"output={tmp_path / 'one'}",), quiet=True)
    out = tmp_path / "two"
    command = ("fsdp", "-m", "safemed_bench", "train", str(path), "--set", f"output={out}")
    _launch(*command)
    last = out / "checkpoints" / "step-0000003.pt"
    states = [torch.load(p, weights_only=True) for p in (tmp_path / "one" / "checkpoints" / last.name, last)]
    _same_form(*states)
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, out / "entry"))
    assert one.keys() == two.keys()
    # Adam's first steps are as long for a gradient that is rounding alone as for any other.
    assert sum(float((one[n] - two[n]).abs().sum()) for n in one) < 1e-6 * sum(t.numel() for t in one.values())
    for mine, theirs in zip(_answers(whole), _answers(out / "entry"), strict=True):
        assert (mine.index, mine.tokens) == (theirs.index, theirs.tokens)
        assert mine.option_logprobs == pytest.approx(theirs.option_logprobs, abs=1e-3)
    lines = [[json.loads(x) for x in (tmp_path / d / "metrics.jsonl").read_text().splitlines()] for d in ("one", "two")]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]], "one process writes"
    assert {"validation", "robustness"} <= {line.get("event") for line in lines[1]}
    last.unlink()  # the one before is inside a stage
    if lora:
        _launch(*command)
        again = load_file(out / "entry" / "model.safetensors")
        assert all(torch.equal(two[name], again[name]) for name in two)
    else:  # one process goes on with what two have written
        again = load_file(train(path, (f"output={out}",), quiet=True) / "model.safetensors")
        assert max(float((two[name] - again[name]).abs().max()) for name in two) < 1e-4


def _same_form(one, two):
    """Names, shapes and types of a checkpoint do not say how many processes wrote it."""
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for name in one:
            _same_form(one[name], two[name])
    elif isinstance(one, torch.Tensor):
        assert (one.shape, one.dtype) == (two.shape, two.dtype)


def test_the_documented_settings_are_taken_and_others_refused(monkeypatch):
    written = yaml.safe_load((CONFIGS / "fsdp.yaml").read_text())["fsdp_config"]
    asked = {
        "fsdp_version": written["fsdp_version"],
        "reshard_after_forward": written["fsdp_reshard_after_forward"],
        "cpu_ram_efficient_loading": written["fsdp_cpu_ram_efficient_loading"],
        "activation_checkpointing": written["fsdp_activation_checkpointing"],
        "cpu_offload": written["fsdp_offload_params"],
    }
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plugin writes it
    sharding._check(FullyShardedDataParallelPlugin(**asked))
    others = {"reshard_after_forward": False, "cpu_ram_efficient_loading": True, "activation_checkpointing": True}
    for name, value in others.items():
        with pytest.raises(UsageError, match=f"fsdp_{name}: {str(not value).lower()}"):
            sharding._check(FullyShardedDataParallelPlugin(**{**asked, name: value}))
    with pytest.raises(UsageError, match="fsdp_version: 2"):
        sharding._check(SimpleNamespace(**{**asked, "fsdp_version": 1}))


def test_whole_weights_are_left_alone():
    layer = torch.nn.Linear(2, 2)
    assert sharding.any_process(layer, True) and not sharding.any_process(layer, False)
    assert sharding.whole({"a": [layer.weight, 1]})["a"][0] is layer.weight
    assert torch.equal(sharding.spread(layer.weight, layer.weight), layer.weight)
