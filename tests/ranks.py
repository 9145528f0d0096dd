"""Gradients of one AT-GRPO step, written to a file: run alone and under torchrun by test_at_grpo.py.

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
from safemed_bench.training.sharding import whole
from safemed_bench.training.stage import Learner
from safemed_bench.training.trainer import _accelerator, schedule


def main(path: str, out: str) -> None:
    config = load_config(path)
    accelerator = _accelerator(config)
    with accelerator.local_main_process_first():
        corpus = load_corpus(config.data, "train")
    vlm = load_start(config, corpus.words, accelerator.device)
    step = next(s for s in schedule(config) if s.stage.grpo)
    method = ATGRPO(Learner.begin(config, step.stage, vlm, corpus, accelerator, Policy(vlm)))
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
    gradients = whole({n: p.grad for n, p in method.policy.named_parameters() if p.grad is not None})
    if accelerator.is_main_process:
        torch.save(gradients, out)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(*sys.argv[1:])
