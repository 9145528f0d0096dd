"""Gradients of one adversarial SFT step and one AT-GRPO step, written to a file: run alone and by a launcher.

python tests/ranks.py CONFIG OUT.pt
"""

import sys
from dataclasses import replace

import torch

from safemed_bench.training.at_grpo import ATGRPO
from safemed_bench.training.checkpoint import load_start
from safemed_bench.training.config import load_config
from safemed_bench.training.data import load_corpus
from safemed_bench.training.policy import Policy
from safemed_bench.training.sft import SFT, SFTLoss
from safemed_bench.training.sharding import is_sharded, whole
from safemed_bench.training.stage import Learner
from safemed_bench.training.trainer import _accelerator, schedule

ENDS = 20.0
"""How much longer the embedding of the token that ends a reply is made: it is then likely after some tokens."""


def main(path: str, out: str) -> None:
    config = load_config(path)
    accelerator = _accelerator(config)
    with accelerator.local_main_process_first():
        corpus = load_corpus(config.data, "train")
    vlm = load_start(config, corpus.words, accelerator.device)
    with torch.no_grad():  # replies of different lengths
        vlm.model.get_input_embeddings().weight[vlm.end_of_turn] *= ENDS

    def learner(step, module):
        return Learner.begin(config, step.stage, vlm, corpus, accelerator, module(vlm))

    step = next(s for s in schedule(config) if s.stage.adversary and not s.stage.grpo)
    taught = SFT(learner(step, SFTLoss))
    taught.backward(step)
    gradients = {"sft": _gradients(vlm.model)}

    step = next(s for s in schedule(config) if s.stage.grpo)
    method = ATGRPO(learner(step, Policy))
    with torch.no_grad():  # away from the reference, so that the KL term has a gradient
        for parameter in method.policy.parameters():
            parameter.mul_(1.1)
    prompts = method._draw(step)
    found = method._collect(prompts, step)
    group = found.advantages.numel() // len(prompts.places)
    # Random weights are never right: made-up advantages, a function of a prompt's place in the whole batch.
    made_up = [torch.randn(group, generator=torch.Generator().manual_seed(place)) for place in prompts.places]
    found = replace(found, advantages=torch.cat(made_up))
    method._learn(prompts, found, method._reference(prompts, found), None)
    gradients["at_grpo"] = _gradients(vlm.model)
    lengths = accelerator.gather(found.mask.sum(-1).flatten(1)).tolist()
    if accelerator.is_main_process:
        held = sum(getattr(p, "_local_tensor", p).numel() for p in vlm.model.parameters())
        told = {"sharded": is_sharded(vlm.model), "processes": accelerator.num_processes, "held": held}
        torch.save({**gradients, **told, "lengths": lengths}, out)
    accelerator.wait_for_everyone()


def _gradients(model):
    """Whole gradients by name, and none left behind."""
    found = whole({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
