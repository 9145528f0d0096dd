"""AT-GRPO on a real, very small Qwen3-VL: the attack, what is learnt from, and runs that continue bit for bit."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from safemed_bench.core.errors import SuiteError
from safemed_bench.core.types import ThreatModel
from safemed_bench.training import train
from safemed_bench.training.adversary import (
    Curriculum,
    FeatureDistance,
    Noised,
    WeightedRollouts,
    gaussian,
    generators,
    perturb,
)
from safemed_bench.training.at_grpo import ATGRPO
from safemed_bench.training.checkpoint import load_start
from safemed_bench.training.config import load_config
from safemed_bench.training.data import load_corpus
from safemed_bench.training.experience import draw
from safemed_bench.training.policy import Policy
from safemed_bench.training.settings import AdversarySettings, CurriculumSettings
from safemed_bench.training.sft import SFTLoss, attacked_rows, taught
from safemed_bench.training.sft import draw as draw_sft
from safemed_bench.training.stage import Learner
from safemed_bench.training.trainer import schedule

CONFIG = """
name: trial
init: tiny
architecture: {hidden: 32, layers: 2, vision_hidden: 32, vision_layers: 2}
data: {name: phantom, images: 64, resolution: 64}
prompt: bare
max_new_tokens: 3
eval_questions: 0
log_every: 1
save_every: 2
export_dtype: float32
stages:
  - name: taught
    steps: 2
    batch_size: 4
    noise: [0.0, 0.1]
    adversary: {eps: 4/255, share: 0.5, curriculum: {start: 1/255, ramp: 2}}
    tasks: [{kind: answer, prompts: [bare]}]
  - name: rewarded
    steps: 4
    batch_size: 4
    learning_rate: 0.01
    warmup: 0
    adversary: {eps: 4/255, steps: 2, rel_step: 0.75, curriculum: {start: 1/255, target: 0.01, memory: 0}}
    grpo: {group_size: 4, beta: 0.1}
    tasks: [{kind: answer, prompts: [bare]}]
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "trial.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def stage(path):
    """`stage(*overrides)`: the method of the rewarded stage on a fresh model, its step, and the corpus."""

    def make(*overrides):
        config = load_config(path, overrides)
        corpus = load_corpus(config.data, "train")
        torch.manual_seed(0)
        vlm = load_start(config, corpus.words, torch.device("cpu"))
        step = next(s for s in schedule(config) if s.stage.name == "rewarded")
        learner = Learner.begin(config, step.stage, vlm, corpus, Accelerator(cpu=True), Policy(vlm))
        return ATGRPO(learner), step

    return make


def _letters(vlm):
    """Make the model answer with letters, about as often A as B: rewards then differ within a group."""
    ids = [vlm.encode(letter)[0] for letter in "AB"]
    head = vlm.model.get_input_embeddings().weight
    with torch.no_grad():
        head[ids] += 3 * head.norm(dim=1).mean() * torch.sign(head[ids].mean(0, keepdim=True)) / head.shape[1] ** 0.5


def _gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# -- the inner maximisation ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A model, a taught batch of it, and rollouts, for all objectives."""
    file = tmp_path_factory.mktemp("inner") / "trial.yaml"
    file.write_text(CONFIG)
    config = load_config(file)
    corpus = load_corpus(config.data, "train")
    vlm = load_start(config, corpus.words, torch.device("cpu"))
    batch = draw_sft(vlm, corpus, config, next(iter(schedule(config))))
    return vlm, batch, batch.canvas.float() / 255


def _objective(name, vlm, batch, clean):
    prompts = taught(vlm, batch.examples).prompts
    if name == "reply":
        return taught(vlm, batch.examples)
    if name == "feature":
        return FeatureDistance.of(vlm, prompts, clean)
    tokens = torch.randint(300, 310, (len(clean), 2, 3), generator=torch.Generator().manual_seed(1))
    weights = (
        torch.tensor([[1.0, 0.0]] * len(clean)) if name == "rollouts" else torch.tensor([[0.5, -0.5]] * len(clean))
    )
    inner = WeightedRollouts(Policy(vlm), prompts, tokens, torch.ones_like(tokens, dtype=torch.bool), weights)
    noise = gaussian([0.1], clean, generators(range(len(clean)), "noise"))
    return Noised(inner, noise) if name == "noised" else inner


@pytest.mark.parametrize("name", ["reply", "feature", "rollouts", "advantages", "noised"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_attack_stays_in_the_ball_climbs_and_leaves_the_model_alone(name, norm, images):
    vlm, batch, clean = images
    eps = 8 / 255 if norm == "linf" else 1.0
    settings = AdversarySettings(norm=norm, eps=eps, steps=4, rel_step=0.4)
    vlm.model.train()
    vlm.model.zero_grad()
    SFTLoss(vlm)(batch.examples, clean).backward()
    before, inner = _gradients(vlm.model), _objective(name, vlm, batch, clean)
    found = perturb(vlm, inner, clean, settings, eps, generators(batch.places, "test"))
    assert vlm.model.training and all(p.requires_grad for p in vlm.model.parameters())
    after = _gradients(vlm.model)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    size = found.delta.abs().amax() if norm == "linf" else found.delta.flatten(1).norm(dim=1).amax()
    assert 0.3 * eps < float(size) <= eps * (1 + 1e-5)
    assert float((clean + found.delta).min()) >= 0 and float((clean + found.delta).max()) <= 1
    assert not found.dead.any()
    with torch.no_grad():
        assert (inner(clean + found.delta).loss > inner(clean).loss).all()


def test_eps_0_changes_nothing(images):
    vlm, batch, clean = images
    settings = AdversarySettings(eps=0.0, steps=2)
    found = perturb(vlm, taught(vlm, batch.examples), clean, settings, 0.0, generators(batch.places))
    assert torch.equal(found.delta, torch.zeros_like(clean))


def test_a_prompt_without_a_right_rollout_keeps_its_random_start(images):
    vlm, batch, clean = images
    inner = _objective("rollouts", vlm, batch, clean)
    inner = replace(inner, weights=torch.zeros_like(inner.weights))
    settings = AdversarySettings(eps=4 / 255, steps=2)
    found = perturb(vlm, inner, clean, settings, settings.eps, generators(batch.places))
    assert (found.dead == 2).all() and float(found.delta.abs().amax()) > 0.5 * settings.eps


def test_eps_grows_by_steps_or_by_reward():
    by_steps = Curriculum(AdversarySettings(eps=0.4, curriculum=CurriculumSettings(start=0.2, ramp=4)))
    assert [by_steps.eps(step) for step in (0, 1, 2, 4, 9)] == pytest.approx([0.2, 0.25, 0.3, 0.4, 0.4])
    plan = CurriculumSettings(start=0.2, target=0.5, step=0.15, memory=0.5)
    by_reward = Curriculum(AdversarySettings(eps=0.4, curriculum=plan))
    reached = []
    for reward in (0.4, 0.4, 0.6, 0.6, 0.9, 1.0, 1.0):
        by_reward.observe(reward)
        reached.append(by_reward.eps(0))
    # .4, .4, .5 -> grows and forgets; .6 -> grows to the full size, and no further
    assert reached == pytest.approx([0.2, 0.2, 0.35, 0.4, 0.4, 0.4, 0.4])
    other = Curriculum(AdversarySettings(eps=0.4, curriculum=plan))
    other.load_state_dict(by_reward.state_dict())
    assert other.state_dict() == by_reward.state_dict()
    assert Curriculum(AdversarySettings(eps=0.4)).eps(0) == 0.4


def test_noise_is_each_images_own():
    clean = torch.full((3, 3, 8, 8), 0.5)
    whole = gaussian([0.1, 0.2], clean, generators((0, 1, 2), "n"))
    part = gaussian([0.1, 0.2], clean[1:], generators((1, 2), "n"))
    assert torch.equal(whole[1:], part)
    assert gaussian([], clean, generators((0, 1, 2))) is None


# -- what is learnt from ---------------------------------------------------------------------------------------------


def test_each_rollout_is_scored_on_the_image_it_came_from_and_the_reference_on_the_clean_one(stage):
    """At batch 4: a tiled pairing of rollouts with prompts or images gives other numbers."""
    method, step = stage()
    prompts = method._draw(step)
    found = method._collect(prompts, step)
    assert not torch.equal(prompts.images["adversarial"], prompts.images["clean"])
    weights = {n: p.detach().clone() for n, p in method.policy.named_parameters()}
    reference = method._reference(prompts, found)
    with torch.no_grad():
        for parameter in method.policy.parameters():
            parameter.mul_(1.3)
    noted, own = method._learn(prompts, found, reference, None)
    vlm = method.learner.vlm
    for weights_now, logps, view_of in (
        (None, own, lambda i, view: prompts.images[view][i]),
        (weights, reference, lambda i, view: prompts.images["clean"][i]),
    ):
        if weights_now:
            method.policy.load_state_dict({**method.policy.state_dict(), **weights_now})
        for i in range(4):
            one = {name: value[i : i + 1] for name, value in prompts.inputs.items()}
            for v, view in enumerate(("clean", "adversarial")):
                values = vlm.pixel_map(view_of(i, view)[None])
                for j in range(2):
                    tokens, mask = found.tokens[i, v, j][None], found.mask[i, v, j][None]
                    with torch.no_grad():
                        alone = method.policy(one, values, tokens, mask, 1).logps
                    torch.testing.assert_close(logps[i, v, j], alone[0], atol=2e-5, rtol=1e-4)
    assert noted["kl"] > 0


@pytest.mark.parametrize("rollouts", ["mixed", "adversarial"])
@pytest.mark.parametrize("objective", ["rollout_nll", "advantage", "answer_ce", "no_think", "feature"])
def test_every_inner_objective_attacks_inside_the_trainer(objective, rollouts, stage):
    """Random weights are never right: objectives that need a right rollout have no gradient there, the others have."""
    method, step = stage(
        f"stages.1.adversary.objective={objective}", f"stages.1.grpo.rollouts={rollouts}", "stages.1.noise=[0.1]"
    )
    prompts = method._draw(step)
    found = method._collect(prompts, step)
    delta = prompts.images["adversarial"] - prompts.images["clean"]
    eps = found.log["attack/eps"]
    assert eps == pytest.approx(1 / 255) and 0.5 * eps < float(delta.abs().max()) <= eps * (1 + 1e-4)
    assert found.log["attack/dead_gradients"] == float(objective in ("rollout_nll", "advantage"))
    assert torch.equal(found.images[:, -1], (prompts.images["adversarial"] + prompts.noise).clamp(0, 1))


def test_attacked_rows_are_spread_over_all_processes():
    assert attacked_rows(range(10), 0.5) == [1, 3, 5, 7, 9] and attacked_rows(range(5), 1.0) == [0, 1, 2, 3, 4]
    shares = [len(attacked_rows(range(rank, 64, 2), 0.8)) for rank in range(2)]
    assert sum(shares) == 51 and attacked_rows((0,), 0.5) == []


def test_groups_without_a_difference_teach_nothing(stage):
    method, step = stage("stages.1.grpo.beta=0")
    prompts = method._draw(step)
    found = method._collect(prompts, step)
    assert found.log["zero_variance_groups"] == 1.0, "random weights never answer with a letter"
    assert not found.advantages.any()
    method._learn(prompts, found, None, None)
    assert not any(g.abs().any() for g in _gradients(method.policy).values())


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dr_grpo", "dapo", "gspo"])
def test_micro_batches_add_up(loss, stage):
    options = (f"stages.1.grpo.loss={loss}", "stages.1.grpo.consistency=0.3")
    gradients = []
    for size in (0, 1, 3):
        method, step = stage(*options, f"stages.1.grpo.micro_batch={size}")
        prompts = method._draw(step)
        found = method._collect(prompts, step)
        torch.manual_seed(3)
        found = replace(found, advantages=torch.randn(found.advantages.shape))
        method._learn(prompts, found, method._reference(prompts, found), None)
        gradients.append(_gradients(method.policy))
    for other in gradients[1:]:
        for name, expected in gradients[0].items():
            scale = float(expected.abs().max()) + 1e-8
            torch.testing.assert_close(other[name], expected, atol=2e-5 * scale + 1e-9, rtol=1e-4)


def test_a_right_answer_on_another_picture_costs(stage):
    method, step = stage("stages.1.grpo.blind_penalty=0.5", "stages.1.batch_size=16", "stages.1.grpo.rollouts=clean")
    _letters(method.learner.vlm)
    prompts = method._draw(step)
    found = method._collect(prompts, step)
    assert method.settings.views == ("clean", "shuffled")
    shown = found.images.shape
    assert shown[:2] == (16, 2) and not torch.equal(found.images[:, 0], found.images[:, 1])
    gained = found.advantages.view(16, 2, 4)
    texts = [
        [method.learner.vlm.decode_text(t[m].tolist()) for t, m in zip(tokens, mask, strict=True)]
        for tokens, mask in zip(found.tokens[:, 1], found.mask[:, 1], strict=True)
    ]
    right = torch.tensor(
        [["ABCD"[q.answer] == text for text in row] for q, row in zip(prompts.questions, texts, strict=True)]
    )
    assert found.log["reward/accuracy/shuffled"] == pytest.approx(float(right.float().mean()))
    assert found.log["reward/total/shuffled"] == pytest.approx(-0.5 * float(right.float().mean()))
    mixed = right.any(1) & ~right.all(1)
    for i in mixed.nonzero().flatten().tolist():
        assert (gained[i, 1][right[i]] < 0).all() and (gained[i, 1][~right[i]] > 0).all()


def test_another_question_image_is_of_the_modality(path):
    config = load_config(path)
    corpus = load_corpus(config.data, "train")
    step = next(iter(schedule(config)))
    drawn = draw(corpus, (), step, 0)
    again = draw(corpus, (), step, 0)
    assert drawn.questions == again.questions and (drawn.shuffled == again.shuffled).all()
    rng = np.random.default_rng(0)
    for row in range(0, len(corpus), 17):
        other = corpus.another_image(row, rng)
        assert corpus.questions[other].modality == corpus.questions[row].modality
        assert corpus.image_of[other] != corpus.image_of[row]


# -- runs ------------------------------------------------------------------------------------------------------------


class _StopError(Exception):
    pass


def _weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("stop_after", [0, 2, 3])  # where the stage begins, at a checkpoint inside it, between two
def test_an_interrupted_run_ends_bit_equal(path, tmp_path, stop_after, monkeypatch):
    whole = train(path, (f"output={tmp_path / 'whole'}",), quiet=True)
    update, calls = ATGRPO.update, iter(range(1, 100))

    def interrupted(self, step):
        if next(calls) > stop_after:
            raise _StopError
        return update(self, step)

    monkeypatch.setattr(ATGRPO, "update", interrupted)
    with pytest.raises(_StopError):
        train(path, (f"output={tmp_path / 'cut'}",), quiet=True)
    monkeypatch.setattr(ATGRPO, "update", update)
    resumed = train(path, (f"output={tmp_path / 'cut'}",), quiet=True)
    one, other = _weights(whole), _weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)
    logs = [
        [json.loads(x) for x in (tmp_path / d / "metrics.jsonl").read_text().splitlines()] for d in ("whole", "cut")
    ]
    for mine, theirs in zip(*logs, strict=True):
        mine.pop("steps_per_second"), theirs.pop("steps_per_second")
        assert mine == theirs
    rewarded = [line for line in logs[0] if line["stage"] == "rewarded"]
    assert {"reward/accuracy/clean", "reward/accuracy/adversarial", "reward/format/clean", "kl", "entropy"} <= set(
        rewarded[0]
    )
    assert {"length/clean", "invalid_rate/adversarial", "zero_variance_groups", "attack/eps"} <= set(rewarded[0])


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
def test_two_processes_give_the_gradient_of_one(loss, path, tmp_path):
    """`torchrun` with two ranks: the same rollouts, perturbations and gradient as one process (`ranks.py`)."""
    options = f"loss: {loss}, consistency: 0.1, micro_batch: 1"
    path.write_text(CONFIG.replace("grpo: {group_size: 4", f"grpo: {{{options}, group_size: 4"))
    script, found = str(Path(__file__).parent / "ranks.py"), []
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])):
        command = [sys.executable, *launcher, script, str(path), str(tmp_path / name)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(tmp_path / name)["at_grpo"])
    one, two = found
    assert one.keys() == two.keys() and max(float(g.abs().max()) for g in one.values()) > 1e-3
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.1.grpo.group_size=5", "even group_size"),
        ("stages.1.grpo.group_size=2", "leaves nothing to compare"),
        ("stages.1.grpo.rewards={acuracy: 1}", "unknown reward 'acuracy'. Did you mean 'accuracy'"),
        ("stages.1.grpo.rewards={accuracy: 0}", "no reward has a weight"),
        ("stages.1.adversary.objective=reply", "needs taught replies"),
        ("stages.0.adversary.objective=rollout_nll", "needs rollouts: give the stage a `grpo` part"),
        ("stages.1.adversary=null", "need an `adversary`"),
        ("stages.1.tasks.0.kind=caption", "one task, of kind answer or rationale"),
        ("stages.1.tasks.0.prompts=[instruct]", "rewarded for what is deployed"),
        ("stages.1.adversary.eps=8", "Did you mean 8/255?"),
        ("stages.0.noise=[-1]", "must not be negative"),
        ("stages.1.grpo.lose=dapo", "loss"),
    ],
)
def test_what_cannot_work_is_refused_when_read(path, override, message):
    with pytest.raises(SuiteError) as caught:
        load_config(path, (override,))
    assert message in str(caught.value)


def test_the_threat_is_the_benchmarks():
    assert AdversarySettings(eps=4 / 255, norm="l2").threat(0.5) == ThreatModel("l2", 0.5)
