"""TRL's own GRPOTrainer as the oracle of our losses, gradients and advantages.

    python tests/test_grpo_trl.py --write

writes tests/golden/grpo_losses.json: small inputs with what TRL makes of them, so that test_grpo_math.py checks the
same equality where TRL is not installed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor

from safemed_bench.training.advantages import advantages
from safemed_bench.training.losses import policy_loss

pytest.importorskip("trl", reason="TRL is the oracle")

from datasets import Dataset
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of TRL and transformers, to each other
GOLDEN = Path(__file__).parent / "golden" / "grpo_losses.json"
KINDS = ("grpo", "bnpo", "dr_grpo", "dapo", "gspo")
SETTINGS: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28, "beta": 0.3, "max_tokens": 6}
GROUP, PROMPTS = 4, ("a b", "c d e f", "g")
WORDS = ("<pad>", "<eos>", *"abcdefghij")


def _tiny(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random model of 12 words, so that replies differ in length; saved, for TRL loads its reference from there."""
    plain = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(WORDS),
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                initializer_range=0.2,
                bos_token_id=None,
                eos_token_id=1,
                pad_token_id=0,
            )
        )
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder), tokenizer


REWARDS = (1.0, 0.0, 0.2, 1.2, 0.1, 0.1, 0.1, 0.1, 0.0, 1.2, 0.0, 0.2)
"""One per reply; those of the second prompt are all equal."""


def trainer_for(kind: str, folder: Path, *, unbiased_kl: bool = True, scale: str = "group") -> GRPOTrainer:
    model, tokenizer = _tiny(folder)
    args = GRPOConfig(
        output_dir=str(folder / "out"),
        loss_type="grpo" if kind == "gspo" else kind,
        importance_sampling_level="sequence" if kind == "gspo" else "token",
        epsilon=SETTINGS["clip_low"],
        epsilon_high=SETTINGS["clip_high"],
        beta=SETTINGS["beta"],
        use_bias_correction_kl=unbiased_kl,
        max_completion_length=SETTINGS["max_tokens"],
        scale_rewards=scale,
        num_generations=GROUP,
        per_device_train_batch_size=len(REWARDS),
        num_iterations=2,  # more than one step per batch of replies: TRL then keeps the old log-probabilities
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: list(REWARDS),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": list(PROMPTS)}),
        processing_class=tokenizer,
    )
    # what its training loop would set
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def rollouts(trainer: GRPOTrainer) -> dict[str, Any]:
    """TRL's own batch, prompt-major; then the policy moves away from the one that sampled it, the reference too."""
    torch.manual_seed(3)
    batch = trainer._generate_and_score_completions([{"prompt": p} for p in PROMPTS for _ in range(GROUP)])
    noise = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=noise)
    return batch


def our_logps(model: torch.nn.Module, batch: dict[str, Any]) -> Tensor:
    """(N, T) log-probabilities of the replies' tokens."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    there = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    width = batch["completion_ids"].shape[1]
    logits = model(input_ids=ids, attention_mask=there).logits[:, -width - 1 : -1]
    return logits.log_softmax(-1).gather(2, batch["completion_ids"][..., None]).squeeze(2)


def gradients(model: torch.nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("unbiased_kl", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_trls(kind, unbiased_kl, tmp_path):
    trainer = trainer_for(kind, tmp_path, unbiased_kl=unbiased_kl)
    batch = rollouts(trainer)
    mask = batch["completion_mask"]
    assert mask.sum(1).unique().numel() > 2, "replies of different lengths"
    theirs = trainer._compute_loss(trainer.model, batch)
    ours = policy_loss(
        kind,
        our_logps(trainer.model, batch),
        batch["old_per_token_logps"],
        batch["advantages"],
        mask,
        ref_logps=batch["ref_per_token_logps"],
        unbiased_kl=unbiased_kl,
        **SETTINGS,
    )
    assert ours.clipped_low > 0 and ours.clipped_high > 0 and ours.clip_fraction < 0.9 and ours.kl > 0.01
    loss_gap = abs(ours.loss.item() - theirs.item())
    pairs = zip(gradients(trainer.model, ours.loss), gradients(trainer.model, theirs), strict=True)
    gradient_gap = max(float((a - b).abs().max()) for a, b in pairs)
    print(f"{kind}: loss {theirs.item():.6f} differs by {loss_gap:.1e}, gradient by {gradient_gap:.1e}")
    assert loss_gap <= 1e-6 and gradient_gap <= 1e-5
    logged = trainer._metrics["train"]
    for name, value in {
        "kl": ours.kl,
        "clip_ratio/low_mean": ours.clipped_low,
        "clip_ratio/high_mean": ours.clipped_high,
        "clip_ratio/region_mean": ours.clip_fraction,
    }.items():
        assert logged[name][-1] == pytest.approx(float(value), abs=1e-6), name


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_trls(scale, tmp_path):
    theirs = rollouts(trainer_for("grpo", tmp_path, scale=scale))["advantages"]
    ours = advantages(torch.tensor(REWARDS), GROUP, scale=scale)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 if scale == "none" else 1e-4)
    # TRL leaves the rounding of the mean, which its small divisor makes larger; ours is exactly nothing
    assert not ours[GROUP : 2 * GROUP].any()


def golden_inputs() -> dict[str, Any]:
    """Plain numbers: ratios on both sides of the clip for advantages of both signs, one reply cut to a single token."""
    draw = torch.Generator().manual_seed(11)
    shape = (4, 5)

    def normal(scale: float) -> Tensor:
        return torch.randn(shape, generator=draw) * scale

    logps = -normal(1.0).abs() - 0.1
    lengths = torch.tensor([5, 1, 3, 4])
    towards_clip = torch.tensor([-0.4, 0.0, 0.0, 0.5])[:, None]  # whole replies, for gspo
    return {
        "logps": _plain(logps, 4),
        "old_logps": _plain((logps + normal(0.4) + towards_clip).clamp(max=0), 4),
        "ref_logps": _plain((logps + normal(0.5)).clamp(max=0), 4),
        "advantages": [1.2, -0.7, 0.4, -0.9],
        "mask": (torch.arange(shape[1]) < lengths[:, None]).int().tolist(),
        # more than the mask holds: this batch is then a shard of a larger one, for the two kinds that count tokens
        "tokens_in_batch": 17,
    }


def _plain(values: Tensor, digits: int) -> Any:
    return [_plain(v, digits) for v in values] if values.dim() else round(float(values), digits)


def golden_case(kind: str, unbiased_kl: bool, inputs: dict[str, Any], folder: Path) -> dict[str, Any]:
    """TRL's loss, its gradient in `logps` and its metrics on given log-probabilities in place of a model's."""
    trainer = trainer_for(kind, folder, unbiased_kl=unbiased_kl)
    logps = torch.tensor(inputs["logps"], requires_grad=True)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps, torch.zeros_like(logps), None)
    mask = torch.tensor(inputs["mask"])
    loss = trainer._compute_loss(
        trainer.model,
        {
            "prompt_ids": torch.zeros(len(mask), 1, dtype=torch.long),
            "prompt_mask": torch.ones(len(mask), 1, dtype=torch.long),
            "completion_ids": torch.zeros_like(mask),
            "completion_mask": mask,
            "advantages": torch.tensor(inputs["advantages"]),
            "old_per_token_logps": torch.tensor(inputs["old_logps"]),
            "ref_per_token_logps": torch.tensor(inputs["ref_logps"]),
            "num_items_in_batch": torch.tensor(inputs["tokens_in_batch"]),
        },
    )
    loss.backward()
    logged = trainer._metrics["train"]
    return {
        "kind": kind,
        "unbiased_kl": unbiased_kl,
        "loss": round(loss.item(), 8),
        "kl": round(logged["kl"][-1], 8),
        "clip_fraction": round(logged["clip_ratio/region_mean"][-1], 8),
        "gradient": _plain(logps.grad, 8),
    }


def golden(folder: Path) -> dict[str, Any]:
    inputs = golden_inputs()
    pairs = [(kind, unbiased_kl) for kind in KINDS for unbiased_kl in (True, False)]
    cases = [golden_case(*pair, inputs, folder / str(i)) for i, pair in enumerate(pairs)]
    return {"source": "TRL 1.16 GRPOTrainer._compute_loss", "settings": SETTINGS, "inputs": inputs, "cases": cases}


def test_the_golden_file_is_what_trl_says(tmp_path):
    stored, fresh = json.loads(GOLDEN.read_text()), golden(tmp_path)
    assert stored["settings"] == fresh["settings"]
    for name, values in fresh["inputs"].items():
        assert torch.allclose(torch.tensor(stored["inputs"][name]), torch.tensor(values)), name
    for old, new in zip(stored["cases"], fresh["cases"], strict=True):
        assert (old["kind"], old["unbiased_kl"]) == (new["kind"], new["unbiased_kl"])
        for name in ("loss", "kl", "clip_fraction", "gradient"):
            torch.testing.assert_close(torch.tensor(old[name]), torch.tensor(new[name]), rtol=0, atol=1e-6)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as scratch:
        text = json.dumps(golden(Path(scratch)), separators=(", ", ": "))
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(text.replace("}, ", "},\n").replace("]], ", "]],\n") + "\n")
