"""The trainer on a real, very small Qwen3-VL: it learns, resumes bit for bit, and is the same on many processes."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from safemed_bench.attacks.base import frozen
from safemed_bench.core.errors import UsageError
from safemed_bench.datasets import base as datasets_base
from safemed_bench.datasets.phantom import WORDS, spec
from safemed_bench.models import loading
from safemed_bench.models.card import card_from_folder
from safemed_bench.models.huggingface import HuggingFaceVLM
from safemed_bench.models.selfcheck import probe_batch
from safemed_bench.models.tiny import TAGS, build_tokenizer
from safemed_bench.training import data, sft, train, trainer
from safemed_bench.training.checkpoint import load_start
from safemed_bench.training.config import TaskConfig, load_config
from safemed_bench.training.log import METRICS, TrainLog
from safemed_bench.training.policy import evaluating
from safemed_bench.training.tasks import letter_tokens, question_example
from safemed_bench.training.validate import sample

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


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "trial.yaml"
    path.write_text(CONFIG)
    return path


def _weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def _lines(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def _steps(folder):
    return sorted(int(p.stem.split("-")[1]) for p in folder.glob("step-*.pt"))


SHORT = ("stages.0.steps=1", "stages.1.steps=1", "eval_questions=0", "export_dtype=float32")


class _StopError(Exception):
    pass


@pytest.mark.parametrize("stop_after", [3, 4, 7])  # inside a stage, at its end, inside the next one
def test_an_interrupted_run_ends_bit_equal(config, tmp_path, stop_after, monkeypatch):
    whole = train(config, (f"output={tmp_path / 'whole'}", "export_dtype=float32"), quiet=True)
    overrides = (f"output={tmp_path / 'cut'}", "export_dtype=float32")
    update, calls = sft.SFT.update, iter(range(1, 100))

    def interrupted(*arguments):
        if next(calls) > stop_after:
            raise _StopError
        return update(*arguments)

    monkeypatch.setattr(sft.SFT, "update", interrupted)
    with pytest.raises(_StopError):
        train(config, overrides, quiet=True)
    monkeypatch.setattr(sft.SFT, "update", update)
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


# -- the origin of checkpoints ---------------------------------------------------------------------------------------


def test_a_fresh_run_sets_the_old_one_aside(config, tmp_path):
    out = tmp_path / "out"
    options = (f"output={out}", "eval_questions=0")
    train(config, options, quiet=True)
    old = _lines(out)
    for _ in range(2):
        train(config, (*options, "seed=1", "stages.1.steps=1"), resume=False, quiet=True)
        assert _steps(out / "checkpoints") == [4, 5], "nothing of its own is removed for the old run's sake"
    assert _steps(out / "checkpoints.1") == [9, 10] and _steps(out / "checkpoints.2") == [4, 5]
    kept = [json.loads(line) for line in (out / "metrics.1.jsonl").read_text().splitlines()]
    assert kept == old and _lines(out)[-1]["step"] == 5
    train(config, (*options, "seed=1", "stages.1.steps=1"), quiet=True)  # goes on from the fresh run's own


def test_other_start_weights_under_the_same_name_are_refused(config, tmp_path):
    start, out = f"output={tmp_path / 'start'}", f"output={tmp_path / 'out'}"
    options = (*SHORT, out, f"init={tmp_path / 'start' / 'entry'}")
    train(config, (*SHORT, start), quiet=True)
    before = train(config, options, quiet=True)
    train(config, (*SHORT, start, "seed=5"), resume=False, quiet=True)
    with pytest.raises(UsageError, match="with other start weights \\(init\\); give") as caught:
        train(config, options, quiet=True)
    assert "--no-resume" in str(caught.value)
    one = _weights(before)
    other = _weights(train(config, options, resume=False, quiet=True))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_other_data_under_the_same_config_are_refused(config, tmp_path, monkeypatch):
    options = (*SHORT, f"output={tmp_path / 'out'}")
    train(config, options, quiet=True)
    monkeypatch.setattr(spec, "GENERATOR_VERSION", spec.GENERATOR_VERSION + 1)
    with pytest.raises(UsageError, match="with other training data; give"):
        train(config, options, quiet=True)
    with pytest.raises(UsageError, match="with another config and other training data; give"):
        train(config, (*options, "seed=1"), quiet=True)


# -- precision -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_accelerator():
    """accelerate keeps the first precision of a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_trained_weights_are_float32_wherever_they_come_from(config, tmp_path, monkeypatch):
    start = train(config, (*SHORT, f"output={tmp_path / 'start'}", "export_dtype=float16"), quiet=True)
    own = loading.torch_dtype
    on_gpu = {"auto": "bf16"}
    monkeypatch.setattr(loading, "torch_dtype", lambda name, device: own(on_gpu.get(name, name), device))
    vlm = load_start(load_config(config, (f"init={start}",)), WORDS, torch.device("cpu"))
    assert {p.dtype for p in vlm.model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in vlm.model.parameters())


def test_gradient_checkpointing_acts_in_the_adversary_s_steps_too(config, tmp_path):
    """They are taken in evaluation mode, where transformers' own switch does nothing; the gradient stays what it is."""
    start = train(config, (*SHORT, f"output={tmp_path / 'start'}"), quiet=True)
    layers, slopes = [], []
    for asked in ("false", "true"):
        overrides = (f"init={start}", f"gradient_checkpointing={asked}")
        vlm = load_start(load_config(config, overrides), WORDS, torch.device("cpu"))
        layer = vlm.model.get_decoder().layers[0].self_attn
        layer.register_forward_hook(lambda *_: layers.append(torch.is_grad_enabled()))
        batch = probe_batch(vlm)
        for mode in (evaluating, nullcontext):
            with frozen(vlm), mode(vlm.model):
                pixels = batch.pixels.requires_grad_()
                loss = vlm.token_loss(batch, pixels, ["A"] * len(batch)).sum()
                slopes.append(torch.autograd.grad(loss, pixels)[0])
    assert len(layers) == 2 + 2 * 2, "once a pass, or twice where it is asked for, in both modes"
    assert all(torch.equal(slopes[0], slope) for slope in slopes[1:])


def test_bf16_is_the_forward_pass_alone(config, tmp_path, fresh_accelerator):
    steps = (*SHORT, "stages.1.steps=3")
    full = _weights(train(config, (*steps, f"output={tmp_path / 'full'}"), quiet=True))
    AcceleratorState._reset_state(True)
    half = _weights(train(config, (*steps, f"output={tmp_path / 'half'}", "precision=bf16"), quiet=True))
    state = torch.load(tmp_path / "half" / "checkpoints" / "step-0000004.pt", weights_only=True)
    moments = [t for s in state["optimizer"]["state"].values() for t in s.values()]
    assert {t.dtype for t in (*moments, *state["model"].values(), *half.values())} == {torch.float32}
    assert any(not torch.equal(full[name], half[name]) for name in full), "the config's precision was not used"


# -- several processes -----------------------------------------------------------------------------------------------


def test_shares_of_a_batch_give_its_gradient(config):
    trial = load_config(config, ("data.augment=true",))
    corpus = data.load_corpus(trial.data, "train")
    vlm = load_start(trial, corpus.words, torch.device("cpu"))
    loss_of = sft.SFTLoss(vlm)

    def gradient(*batches):
        vlm.model.zero_grad()
        for batch in batches:
            pixels = None if batch.canvas is None else batch.canvas.float() / 255
            (loss_of(batch.examples, pixels) / len(batches)).backward()
        return {name: p.grad for name, p in vlm.model.named_parameters()}

    for step in list(trainer.schedule(trial))[3:7:3]:  # text alone, and with images
        whole = sft.draw(vlm, corpus, trial, step)
        parts = [whole.share(rank, 2) for rank in range(2)]
        assert Counter(e.user for part in parts for e in part.examples) == Counter(e.user for e in whole.examples)
        one, many = gradient(whole), gradient(*parts)
        for name, expected in one.items():
            assert (expected is None) == (many[name] is None)
            if expected is not None:
                torch.testing.assert_close(many[name], expected, rtol=1e-4, atol=1e-6)


def test_a_batch_that_cannot_be_shared_is_refused(config, monkeypatch):
    monkeypatch.setattr(trainer.Accelerator, "num_processes", 3)
    with pytest.raises(UsageError, match="stage 'binding': 3 processes cannot share a batch_size of 8 equally"):
        train(config, quiet=True)


def test_a_task_keeps_to_its_question_types(config, tmp_path):
    trial = load_config(config)
    corpus = data.load_corpus(trial.data, "train")
    kinds = [q.question_type for q in corpus.questions]
    rows = corpus.rows_of(["Lesion Grading", "Disease Diagnosis", "Lesion Grading"])
    expected = [i for i, kind in enumerate(kinds) if kind in ("Disease Diagnosis", "Lesion Grading")]
    assert rows.tolist() == expected and 0 < len(rows) < len(corpus)
    assert corpus.rows_of(()).tolist() == list(range(len(corpus)))
    with pytest.raises(UsageError, match=r"no question of type 'Lesion Gradng'\. Did you mean 'Lesion Grading'"):
        train(config, ("stages.1.tasks.1.question_types=[Lesion Gradng]", f"output={tmp_path}"), quiet=True)


def test_only_the_first_process_writes_the_log(tmp_path):
    with TrainLog(tmp_path, 1, 0, quiet=True, main=False) as log:
        log.step(0, "stage", {"loss": 1.0}, 1, 1.0)
        log.event(1, "validation", {})
    assert not (tmp_path / METRICS).exists()


def test_a_line_that_a_killed_run_left_half_written_is_dropped(tmp_path):
    (tmp_path / METRICS).write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    with TrainLog(tmp_path, 3, 2, quiet=True) as log:
        log.step(2, "stage", {"loss": 1.0}, 1, 1.0)
    assert [line["step"] for line in _lines(tmp_path)] == [1, 3]


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(config, tmp_path):
    """Text-only steps, then steps with images, with validation and a checkpoint in between."""
    options = ("export_dtype=float32", "eval_every=5", "stages.0.steps=3", "stages.1.steps=4")
    whole = train(config, (f"output={tmp_path / 'one'}", *options), quiet=True)
    sets = [word for option in (f"output={tmp_path / 'two'}", *options) for word in ("--set", option)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "safemed_bench", "train", str(config), *sets]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = _weights(whole), _weights(tmp_path / "two" / "entry")
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    lines = [_lines(tmp_path / name) for name in ("one", "two")]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]], "one process writes"
    for mine, theirs in zip(*lines, strict=True):
        for name in mine.keys() - {"step", "stage", "event", "steps_per_second"}:
            assert mine[name] == pytest.approx(theirs[name], abs=1e-4), name


# -- validation ------------------------------------------------------------------------------------------------------


def test_validation_begins_early(config, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "EARLY", 2)
    out = tmp_path / "out"
    train(config, (f"output={out}", "stages.0.steps=3", "stages.1.steps=2", "eval_every=4"), quiet=True)
    assert [line["step"] for line in _lines(out) if "event" in line] == [2, 4, 5]


def test_validation_is_balanced(config):
    trial = load_config(config, ("eval_questions=64",))
    corpus = data.load_corpus(trial.data, "validation")
    rows = sample(corpus, trial)
    asked = [corpus.questions[row] for row in rows]
    assert len(set(rows)) == 64 and rows == sample(corpus, trial)
    assert set(Counter(q.modality for q in asked).values()) == {8}
    kinds, everywhere = Counter(q.question_type for q in asked), Counter(q.question_type for q in corpus.questions)
    for kind, number in everywhere.items():
        assert abs(kinds[kind] / 64 - number / len(corpus)) < 0.05, kind
    assert sample(corpus, load_config(config, ("eval_questions=8",))) == rows[:8]


def test_one_cache_folder():
    assert data.cache_folder is datasets_base.cache_folder


# -- the letter's tokens ---------------------------------------------------------------------------------------------


class _Tokens:
    """A tokenizer that splits text by a pattern; ids are handed out as tokens come."""

    end_of_turn = 0

    def __init__(self, pattern):
        self.pattern, self.known = re.compile(pattern, re.DOTALL), {}

    def encode(self, text):
        return tuple(self.known.setdefault(part, len(self.known) + 1) for part in self.pattern.findall(text))

    def spelt(self, tokens):
        names = {number: part for part, number in self.known.items()}
        return [names[token] for token in tokens]


TOKENIZERS = {
    "letters of their own": (r"</?\w+>| ?\w+| ?.", [" B", "B"]),
    "joined to the sign before": (r"</?\w+|>\w?| ?\w+| ?.", [" B", ">B"]),
    "one letter joined, others not": (r"</?\w+|>B?| ?\w+| ?.", [" B", ">B"]),
    "others joined, this one not": (r"</?\w+|>[ACD]?| ?\w+| ?.", [" B", ">", "B"]),
    "joined to the sign after": (r"\w</?|</?|\w+| |.", ["B</", "B</"]),
    "characters": (r".", ["B", "B"]),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_letters_tokens_are_found_in_any_tokenizer(name):
    pattern, expected = TOKENIZERS[name]
    model, task = _Tokens(pattern), TaskConfig(kind="rationale", prompts=("think_brief",), letter_weight=5)
    question = data.Question("", "", "", "A B or B?", ("B or A", "B", "A"), 1, "", "", "", "train")
    example = question_example(model, task, question, "A B shows B . so B A", np.random.default_rng(0))
    heavy = [token for token, weight in zip(example.reply, example.weights, strict=True) if weight == 5]
    assert model.spelt(heavy) == expected
    assert set(example.weights) == {1.0, 5.0} and example.reply[-1] == 0 and example.weights[-1] == 1


def test_the_letters_tokens_of_the_default_entries():
    encode = partial(build_tokenizer(WORDS).encode, add_special_tokens=False)
    model = type("Model", (), {"encode": staticmethod(encode)})
    for text, place in (("B", 0), ("<answer>B</answer>", 8), ("<think>this image is CT . so CT B</think>", 32)):
        tokens = encode(text)
        assert text[place] == "B"
        assert [tokens[i] in {*encode("B"), *encode(" B")} for i in letter_tokens(model, text, place)] == [True]
