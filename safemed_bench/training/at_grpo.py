"""AT-GRPO (2512.19317): adversarial training inside group relative policy optimisation.

One step: rollouts on the clean images; one perturbation per prompt that makes their right ones unlikely, found by the
benchmark's own PGD on raw pixels; rollouts on the attacked images; rewards, advantages, and a clipped policy gradient
in which each log-probability is of the image its rollout came from, while the reference sees the clean one.

Rows are prompt-major throughout: P prompts, V images (views) of each, g rollouts of each image.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attacks.base import Prepared
from ..attacks.objectives import AnswerToken, NoThink
from ..core.seeds import derive_seed
from ..core.types import Answer
from ..models.base import Batch
from .advantages import advantages, zero_variance_share
from .adversary import Curriculum, FeatureDistance, Noised, WeightedRollouts, gaussian, generators, perturb
from .data import augmented
from .experience import Drawn, Experience, Prompts, draw, is_right, joined, judge
from .losses import PolicyLoss, consistency, policy_loss
from .policy import Policy, exchanged
from .rollout import Rollouts, draws, sample
from .sharding import spread
from .stage import Learner, Step


class ATGRPO:
    """One stage of AT-GRPO."""

    def __init__(self, learner: Learner) -> None:
        assert learner.stage.grpo is not None
        self.learner, self.settings = learner, learner.stage.grpo
        self.policy: Policy = learner.accelerator.unwrap_model(learner.module)
        self.curriculum = Curriculum(learner.stage.adversary) if learner.stage.adversary else None
        self.prompt = learner.vlm.prompt
        self.max_tokens = self.settings.max_new_tokens or learner.config.max_new_tokens
        self.reference = self._weights() if self.settings.beta else {}

    def update(self, step: Step) -> dict[str, float]:
        """One batch of rollouts and `iterations` optimiser steps on it."""
        prompts = self._draw(step)
        with self.learner.accelerator.autocast():
            experience = self._collect(prompts, step)
            reference = self._reference(prompts, experience)
        old: Tensor | None = None
        for _ in range(self.settings.iterations):
            noted, old = self._learn(prompts, experience, reference, old)
            noted |= self.learner.descend()
        self.learner.scheduler.step()
        return self.learner.shared(experience.log | noted)

    # -- prompts and rollouts --------------------------------------------------------------------------------------

    def _draw(self, step: Step) -> Prompts:
        """This process's share of the questions of a step; each with its options in a new order."""
        learner = self.learner
        drawn = draw(learner.corpus, learner.stage.tasks[0].question_types, step, learner.config.seed)
        if learner.config.data.augment:
            rng = np.random.default_rng(derive_seed(learner.config.seed, "augment", step.number))
            drawn = Drawn(drawn.questions, augmented(drawn.canvas, rng), drawn.shuffled)
        rank, processes = learner.accelerator.process_index, learner.processes
        questions, places = drawn.questions[rank::processes], tuple(range(len(drawn.questions)))[rank::processes]
        device = learner.vlm.device
        images = {
            "clean": torch.from_numpy(drawn.canvas[rank::processes]).to(device).float() / 255,
            "shuffled": torch.from_numpy(drawn.shuffled[rank::processes]).to(device).float() / 255,
        }
        noise = gaussian(
            learner.stage.noise, images["clean"], generators(places, "noise", learner.config.seed, step.number)
        )
        inputs = learner.vlm.compose([self.prompt.user_text(q) for q in questions])
        return Prompts(questions, places, inputs, images, noise)

    def _rollouts(self, prompts: Prompts, view: str, step: Step, group: int, temperature: float) -> Rollouts:
        parts = (self.learner.config.seed, "rollouts", step.number, view)
        uniforms = torch.cat([draws(*parts, p, n=group, max_new_tokens=self.max_tokens) for p in prompts.places])
        values = self.learner.vlm.pixel_map(prompts.seen(view))
        return sample(
            self.policy,
            prompts.inputs,
            values,
            group,
            uniforms,
            max_new_tokens=self.max_tokens,
            temperature=temperature,
            top_p=self.settings.top_p,
        )

    def _collect(self, prompts: Prompts, step: Step) -> Experience:
        settings, found, log = self.settings, dict[str, Rollouts](), dict[str, float]()
        for view in settings.views:
            if view == "adversarial":
                prompts.images[view], noted = self._attacked(prompts, found.get("clean"), step)
                log |= noted
            found[view] = self._rollouts(prompts, view, step, settings.per_view, settings.temperature)
        judged = [judge(settings, self.learner.vlm, prompts.questions, found[view], view) for view in settings.views]
        for view, (_, noted) in zip(settings.views, judged, strict=True):
            log |= {f"{name}/{view}": value for name, value in noted.items()}
        if self.curriculum and "adversarial" in settings.views:
            reward = {"reward": log["reward/accuracy/adversarial"]}
            self.curriculum.observe(self.learner.shared(reward)["reward"])
        rewards = torch.stack([row for row, _ in judged], dim=1)
        parts = [view for view in settings.views for _ in range(settings.per_view)]
        gains, equal = self._advantages(rewards.flatten(), parts)
        tokens, mask = joined([found[view] for view in settings.views], len(prompts.questions))
        images = torch.stack([prompts.seen(view) for view in settings.views], dim=1)
        return Experience(images, tokens, mask, gains.to(images.device), log | {"zero_variance_groups": equal})

    def _advantages(self, rewards: Tensor, parts: Sequence[str]) -> tuple[Tensor, float]:
        """(P * V * g,) advantages of this process's rows, and the share of groups that teach nothing."""
        settings, accelerator = self.settings, self.learner.accelerator
        # A shuffled image's rollouts are worth less than nothing where right: never to be compared with the others.
        over = "part" if "shuffled" in parts else settings.advantage_over
        equal = zero_variance_share(rewards, len(parts), parts, over)
        if settings.scale != "batch" or self.learner.processes == 1:
            return advantages(rewards, len(parts), parts, settings.scale, over), equal
        whole: Tensor = accelerator.gather(rewards.to(accelerator.device)).cpu()
        mine = slice(accelerator.process_index * len(rewards), (accelerator.process_index + 1) * len(rewards))
        return advantages(whole, len(parts), parts, settings.scale, over)[mine], equal

    # -- the attack ------------------------------------------------------------------------------------------------

    def _attacked(self, prompts: Prompts, clean: Rollouts | None, step: Step) -> tuple[Tensor, dict[str, float]]:
        """(P, 3, H, W) attacked images, before noise, and what is to be logged."""
        adversary = self.learner.stage.adversary
        assert adversary is not None and self.curriculum is not None
        eps = self.curriculum.eps(step.in_stage)
        inner = self._inner(prompts, clean, step)
        inner = inner if prompts.noise is None else Noised(inner, prompts.noise)
        seeds = generators(prompts.places, "pgd", self.learner.config.seed, step.number)
        found = perturb(self.learner.vlm, inner, prompts.images["clean"], adversary, eps, seeds)
        dead = float((found.dead > 0).float().mean())
        return prompts.images["clean"] + found.delta, {"attack/eps": eps, "attack/dead_gradients": dead}

    def _inner(self, prompts: Prompts, clean: Rollouts | None, step: Step) -> Prepared:
        """The objective that this stage's adversary maximises."""
        adversary = self.learner.stage.adversary
        name = (adversary.objective if adversary else None) or "rollout_nll"
        vlm = self.learner.vlm
        if name == "feature":
            return FeatureDistance.of(vlm, prompts.inputs, prompts.seen("clean"))
        if clean is None:  # no rollouts on the clean image are trained on: the greedy reply stands in for them
            clean, group = self._rollouts(prompts, "clean", step, 1, 0.0), 1
        else:
            group = self.settings.per_view
        count = len(prompts.questions)
        if name in ("answer_ce", "no_think"):
            canvas = (prompts.images["clean"] * 255).round().byte()
            batch = Batch(prompts.questions, canvas, prompts.inputs)
            own = [Answer(None, "valid", text) for text in clean.texts(vlm.decode_text)[::group]]
            return (AnswerToken() if name == "answer_ce" else NoThink()).prepare(vlm, batch, own)
        texts = zip(clean.texts(vlm.decode_text), clean.finished.tolist(), strict=True)
        right = torch.tensor(
            [is_right(text, done, prompts.questions[i // group], self.prompt) for i, (text, done) in enumerate(texts)]
        ).view(count, group)
        tokens, mask = (t.view(count, group, -1) for t in (clean.tokens, clean.mask))
        if name == "advantage":
            weights = advantages(right.float().flatten(), group, scale="none").view(count, group)
            return WeightedRollouts(self.policy, prompts.inputs, tokens, mask, weights.to(vlm.device))
        # One right rollout of each prompt stands for all: the attack then costs what one on a reply costs.
        first = right.float().argmax(1).to(vlm.device)
        rows = torch.arange(count, device=vlm.device)
        weights = right.any(1).float()[:, None].to(vlm.device)
        return WeightedRollouts(
            self.policy, prompts.inputs, tokens[rows, first][:, None], mask[rows, first][:, None], weights
        )

    # -- learning --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _reference(self, prompts: Prompts, experience: Experience) -> Tensor | None:
        """(P, V, g, T) log-probabilities under the start of the stage; None without a KL term."""
        if not self.settings.beta:
            return None
        _, views, group, width = experience.tokens.shape
        if self.settings.reference_image == "clean":  # one prefix serves all views of a prompt
            pixels, inputs, group = prompts.seen("clean"), prompts.inputs, views * group
        else:
            pixels, inputs = experience.images.flatten(0, 1), _repeated(prompts.inputs, views)
        arguments = (
            inputs,
            self.learner.vlm.pixel_map(pixels),
            experience.tokens.reshape(-1, width),
            experience.mask.reshape(-1, width),
            group,
            self.settings.temperature,
        )
        with exchanged(self.policy, self.reference):
            logps: Tensor = self.policy(*arguments).logps
        return logps.view(experience.tokens.shape)

    def _learn(
        self, prompts: Prompts, experience: Experience, reference: Tensor | None, old: Tensor | None
    ) -> tuple[dict[str, float], Tensor]:
        """Gradients of one pass over the experience, in micro-batches of prompts; what is logged, and the old
        log-probabilities: those of the first pass, whose ratio is 1."""
        learner, count = self.learner, len(prompts.questions)
        size = self.settings.micro_batch or count
        tokens = self._tokens(experience)
        noted, kept = dict[str, float](), []
        for start in range(0, count, size):
            rows = slice(start, min(start + size, count))
            last = rows.stop == count
            with learner.accumulating() if not last else nullcontext():
                ref = None if reference is None else reference[rows]
                before = None if old is None else old[rows]
                loss, logps, values = self._loss(prompts, experience, rows, ref, before, tokens)
                learner.accelerator.backward(loss)
            kept.append(logps)
            share = (rows.stop - rows.start) / count
            for name, value in values.items():
                noted[name] = noted.get(name, 0.0) + share * value
        return noted, torch.cat(kept) if old is None else old

    def _tokens(self, experience: Experience) -> tuple[float, float]:
        """Tokens of all rollouts, and of those on attacked images, in the whole batch by the number of processes."""
        counts: dict[str, float] = {
            view: float(n) for view, n in zip(self.settings.views, experience.mask.sum((0, 2, 3)), strict=True)
        }
        counts = self.learner.shared(counts)
        return sum(counts.values()), counts.get("adversarial", 0.0)

    def _loss(
        self,
        prompts: Prompts,
        experience: Experience,
        rows: slice,
        reference: Tensor | None,
        old: Tensor | None,
        tokens_in_batch: tuple[float, float],
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Loss of the prompts at `rows`, scaled so that the micro-batches' losses add up to the whole batch's."""
        settings = self.settings
        images, tokens, mask = experience.images[rows], experience.tokens[rows], experience.mask[rows]
        count, views, group, width = tokens.shape
        paired = settings.consistency > 0 and "adversarial" in settings.views
        if paired:  # the attacked images' rollouts once more, on the clean image
            at = settings.views.index("adversarial")
            images = torch.cat([images, prompts.seen("clean")[rows][:, None]], 1)
            tokens, mask = (torch.cat([t, t[:, at : at + 1]], 1) for t in (tokens, mask))
        shown = images.shape[1]
        inputs = _repeated({k: v[rows] for k, v in prompts.inputs.items()}, shown)
        out = self.learner.module(
            inputs,
            self.learner.vlm.pixel_map(images.flatten(0, 1)),
            tokens.reshape(-1, width),
            mask.reshape(-1, width),
            group,
            settings.temperature,
            paired,
        )
        logps = out.logps.view(count, shown, group, width)[:, :views]
        gains = experience.advantages.view(len(experience.tokens), -1)[rows].flatten()
        flat_mask = experience.mask[rows].reshape(-1, width)
        found = policy_loss(
            settings.loss,
            logps.reshape(-1, width),
            (logps.detach() if old is None else old).reshape(-1, width),
            gains,
            flat_mask,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            ref_logps=None if reference is None else reference.reshape(-1, width),
            beta=settings.beta,
            max_tokens=self.max_tokens,
            tokens_in_batch=tokens_in_batch[0],
            unbiased_kl=settings.unbiased_kl,
        )
        part = count / len(experience.tokens)
        loss = found.loss * (1.0 if settings.loss in ("bnpo", "dapo") else part)
        values = _log(found, out.entropies.view(count, shown, group, width)[:, :views], experience.mask[rows])
        if paired:
            logits = out.logits.view(count, shown, group, width, -1)
            apart = consistency(logits[:, -1], logits[:, at], mask[:, at], tokens_in_batch=tokens_in_batch[1])
            loss = loss + settings.consistency * apart
            values["loss/consistency"] = float(apart.detach()) / part
        return loss, logps.detach(), values

    # -- state -----------------------------------------------------------------------------------------------------

    def _weights(self) -> dict[str, Tensor]:
        """A copy of what is trained, as the policy names it; the rest is the same for policy and reference."""
        return {n: p.detach().clone() for n, p in self.policy.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, Any]:
        curriculum = self.curriculum.state_dict() if self.curriculum else {}
        return {"curriculum": curriculum, "reference": self.reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.curriculum:
            self.curriculum.load_state_dict(state["curriculum"])
        own = dict(self.policy.named_parameters())
        self.reference = {n: spread(t, own[n]) for n, t in state["reference"].items()}


def _repeated(inputs: dict[str, Tensor], times: int) -> dict[str, Tensor]:
    return {name: value.repeat_interleave(times, 0) for name, value in inputs.items()}


def _log(found: PolicyLoss, entropies: Tensor, mask: Tensor) -> dict[str, float]:
    counted = mask.sum().clamp(min=1)
    log = {
        "loss/policy": float(found.loss.detach()),
        "clip_fraction": float(found.clip_fraction),
        "entropy": float(entropies.sum() / counted),
    }
    return log | ({"kl": float(found.kl)} if found.kl is not None else {})
