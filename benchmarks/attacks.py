"""Attacks side by side with ART, Foolbox and torchattacks: `python benchmarks/attacks.py [--quick] [--json]`.

One process, the same questions, objective (the answer token's cross-entropy), eps, steps and restarts, and one judge:
the deployed path on the 8-bit image. Each peer climbs our module, whose own pass it gets, and the stock Hugging Face
module as a user would wrap it (the whole LM head, no batched vision path, parameters that ask for gradients). Ours
climbs through the shortcut that `climbing` opens; `--module "our module and pass"` lends it to the peers. Rounds take
turns, so that whatever else the machine does falls on all. Seconds include the judge. The peers get a whole batch
wherever they keep its order; the modules refuse any batch but their own, so that none is measured on images paired with
other images' questions.

`same_verdicts`: the peer leaves the same questions standing as we do (random starts differ, so few may not agree). A
second table, strength, holds `safemed-attack` against what each peer has, at about as many gradient steps and queries a
question. Work per step is in forward passes' FLOPs, of the question that is stepped; the judge is not in it.

The peers, which nothing else needs: `pip install --no-deps torchattacks==3.5.1 foolbox==3.3.4 eagerpy`, and for Foolbox
`pip install requests GitPython`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import reporting
import torch
from meter import flops
from peers import PEERS, Module, foolbox_fgsm, foolbox_pgd
from torch import Tensor

from safemed_bench.attacks import build_objective, build_strike
from safemed_bench.attacks.base import AttackResult, climbing, frozen
from safemed_bench.attacks.cascade import SafeMedAttack
from safemed_bench.attacks.pursuit import Scored
from safemed_bench.attacks.threat import project, quantize
from safemed_bench.core.types import ThreatModel
from safemed_bench.datasets import load
from safemed_bench.datasets.images import load_canvas
from safemed_bench.models import load_model
from safemed_bench.models.base import Batch
from safemed_bench.models.loading import load_weights
from safemed_bench.results.intervals import proportion
from safemed_bench.suite.schema import DataSpec, ModelSpec

SIDE = 64
PACKAGES = ("art", "foolbox", "torchattacks")
MODULES = OUR_MODULE, STOCK_MODULE = ("our module", "stock module")
LENT = "our module and pass"
"""What `climbing` opens, lent to the peers as well: what is left is what an attack itself does better."""
Clock = Callable[[], float]
Way = Callable[[], Tensor]
"""An attack and its judge: (n,) bool, which questions still stand."""


@dataclass(frozen=True)
class Size:
    """questions: attacked ones, all answered rightly. strength: of these, in the second table. queries: of Square.
    modules: which ones the peers climb."""

    questions: int
    strength: int
    steps: int
    restarts: int
    apgd_steps: int
    queries: int
    rounds: int
    eps: float
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """ours, theirs: seconds of each round, and the questions that stand at the end."""

    name: str
    ours: Sequence[float]
    ours_robust: Tensor
    peer: str
    theirs: Sequence[float]
    theirs_robust: Tensor

    def row(self) -> dict[str, Any]:
        stand = [round(float(robust.float().mean()), 4) for robust in (self.ours_robust, self.theirs_robust)]
        more = {"ours_robust": stand[0], "peer_robust": stand[1], "n": len(self.ours_robust)}
        same = torch.equal(self.ours_robust, self.theirs_robust)
        return reporting.row(self.name, self.ours, self.peer, self.theirs, same, **more)


class Bench:
    """One entry and `size.questions` questions that it answers rightly, also by the scores that are climbed."""

    def __init__(self, entry: str, size: Size, clock: Clock) -> None:
        self.size, self.clock, self.threat = size, clock, ThreatModel("linf", size.eps)
        self.vlm: Any = load_model(ModelSpec(name=entry), SIDE, device="cpu")
        questions = load(DataSpec(name="phantom", per_modality=max(2, -(-size.questions // 4)))).questions
        canvas = [torch.from_numpy(load_canvas(Path(q.image), SIDE)).permute(2, 0, 1) for q in questions]
        batch = self.vlm.prepare(questions, torch.stack(canvas))
        answers = self.vlm.answer(batch, batch.pixels)
        right = [i for i, (a, q) in enumerate(zip(answers, questions, strict=True)) if a.index == q.answer]
        chosen, own = batch.select(right), [answers[i] for i in right]
        with torch.no_grad():
            suspects = self.prepared(self.vlm, chosen, own)(chosen.pixels).suspects
        keep = spread((~suspects).nonzero().flatten().tolist(), size.questions)
        self.batch: Batch = chosen.select(keep)
        self.answers = [own[i] for i in keep]
        self.targets, self.pixels = self.batch.targets, self.batch.pixels
        stock = copy.copy(self.vlm)  # the same prompts and pixel map around a model that nothing was changed in
        stock.model, stock._head_on_slice = load_weights(self.vlm.card, torch.device("cpu"), "fp32"), False
        stock.model.requires_grad_(True)  # as from_pretrained gives it
        ours = Module(self.prepared(self.vlm, self.batch, self.answers), self.batch).eval()
        self.modules = {
            OUR_MODULE: ours,
            LENT: ours,
            STOCK_MODULE: Module(self.prepared(stock, self.batch, self.answers), self.batch).eval(),
        }

    @staticmethod
    def prepared(vlm: Any, batch: Batch, answers: Sequence[Any]) -> Scored:
        found = build_objective("answer").prepare(vlm, batch, answers)
        assert isinstance(found, Scored)
        return found

    def standing(self, images: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """The judge: quantised into the ball, then the deployed path."""
        batch = self.batch if rows is None else self.batch.select(rows)
        clean = batch.pixels
        delta = project(self.threat, images.detach().float() - clean, clean)
        shown = quantize(self.threat, batch.canvas, clean + delta).float() / 255
        found = self.vlm.answer(batch, shown)
        return torch.tensor([a.index == q.answer for a, q in zip(found, batch.questions, strict=True)])

    def strike(self, attack: str, objective: str, rows: Sequence[int] | None = None, **parameters: Any) -> AttackResult:
        """One of ours, or of ART's through our plugin (one question per call)."""
        places = list(range(len(self.batch))) if rows is None else list(rows)
        return build_strike(attack, objective, parameters)(
            self.vlm,
            self.batch.select(places),
            self.threat,
            generators=[torch.Generator().manual_seed(i) for i in places],
            clean_answers=[self.answers[i] for i in places],
        )

    # -- speed -----------------------------------------------------------------------------------------------------

    def speed(self) -> tuple[list[Case], dict[str, float], float]:
        """A case for each attack, peer and module; the work of one step of each, in forward passes; and which share of
        all steps we take."""
        cases, size = [], self.size
        each, share = self.own_work()
        work = {"safemed-bench PGD": each}
        settings = {
            "pgd": (f"PGD-{size.steps} x {size.restarts}", size.steps, size.restarts, PACKAGES),
            "apgd": (f"APGD-{size.apgd_steps}", size.apgd_steps, 1, ("art", "torchattacks")),
        }  # fmt: skip
        for attack, (label, steps, restarts, peers) in settings.items():
            ways: dict[str, Way] = {
                "ours": lambda a=attack, s=steps, r=restarts: ~self.strike(a, "answer", steps=s, restarts=r).success
            }
            for peer in peers:
                for shown in size.modules:
                    make, module = PEERS[peer, attack], self.modules[shown]
                    ways[f"{peer}, {shown}"] = lambda m=module, f=make, s=steps, r=restarts, lent=shown == LENT: (
                        self.judged(f, m, s, r, climbing if lent else frozen)
                    )
            seconds, stand = timed(ways, size.rounds, self.clock)
            cases += [
                Case(f"{self.vlm.name} {label}", seconds["ours"], stand["ours"], way, seconds[way], stand[way])
                for way in ways
                if way != "ours"
            ]
        for peer in PACKAGES:
            work[f"{peer} PGD"] = self.peer_work(PEERS[peer, "pgd"])
        return cases, work, share

    def judged(self, make: Any, module: Module, steps: int, restarts: int, inside: Any = frozen) -> Tensor:
        """Stands if it does on each image that the peer gives."""
        with inside(self.vlm):
            images = make(module, self.pixels, self.targets, self.size.eps, steps, restarts)
        return torch.stack([self.standing(image) for image in images]).all(dim=0)

    def one_forward(self) -> float:
        """FLOPs of one forward pass of all questions through our module."""
        with torch.no_grad():
            return flops(lambda: self.modules[OUR_MODULE](self.pixels))

    def own_work(self) -> tuple[float, float]:
        """All passes of ours over all steps of ours, by the work that they take: what was dropped from the batch is in
        neither. And our steps as a share of those that carry every question through every restart."""

        def step() -> None:
            pixels = self.pixels.clone().requires_grad_()
            torch.autograd.grad(self.modules[OUR_MODULE](pixels).sum(), pixels)

        with climbing(self.vlm):
            both = flops(step) / self.one_forward()
        result = self.strike("pgd", "answer", steps=self.size.steps, restarts=self.size.restarts)
        forwards, steps = int(result.forwards.sum()), int(result.backwards.sum())
        share = steps / (len(self.batch) * self.size.steps * self.size.restarts)
        return (forwards + (both - 1) * steps) / steps, share

    def peer_work(self, make: Any) -> float:
        """Parameters ask for gradients, as they do in a module that nobody froze."""
        module, steps = self.modules[OUR_MODULE], self.size.steps
        parameters = [*self.vlm.model.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            spent = flops(lambda: make(module, self.pixels, self.targets, self.size.eps, steps, 1))
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
        return spent / self.one_forward() / steps

    # -- strength --------------------------------------------------------------------------------------------------

    def strength(self) -> list[dict[str, Any]]:
        """Robust accuracy of the first `size.strength` questions, with passes a question."""
        size, rows = self.size, list(range(min(self.size.strength, len(self.batch))))
        ours = SafeMedAttack()
        stages = ours.stages(self.vlm.reasons)
        budget = sum(getattr(s.attack, "steps", 1) * getattr(s.attack, "restarts", 1) for s in stages[:-1])
        mine = self.strike("safemed-attack", "", rows, queries=size.queries)
        found = {f"safemed-attack ({budget} steps, {size.queries} queries at most)": ~mine.success}
        half = budget // 2
        parts = [
            self.strike("art:APGD", "answer", rows, steps=half),
            self.strike("art:APGD", "margin", rows, steps=half),
            self.strike("art:Square", "", rows, queries=size.queries),
        ]
        standing = torch.stack([~p.success for p in parts]).all(dim=0)
        found[f"ART APGD-CE + APGD-margin ({half} steps each) + Square"] = standing
        found[f"torchattacks AutoAttack's parts ({half} steps each) + Square"] = self.auto_attack(rows, half)
        restarts = max(budget // size.steps, 1)
        made = foolbox_pgd(self.modules[OUR_MODULE], self.pixels, self.targets, size.eps, size.steps, restarts)
        made += foolbox_fgsm(self.modules[OUR_MODULE], self.pixels, self.targets, size.eps)
        every = torch.stack([self.standing(image) for image in made]).all(dim=0)
        found[f"Foolbox PGD-{size.steps} x {restarts} + FGSM"] = every[rows]
        images = np.unique([self.batch.questions[row].image for row in rows], return_inverse=True)[1]
        return [
            {"entry": self.vlm.name, "attack": name, **robust(stand, images),
             "only_it_fools": int((found_by_none_else(found, name) & ~stand).sum())}
            for name, stand in found.items()
        ]  # fmt: skip

    def auto_attack(self, rows: Sequence[int], steps: int) -> Tensor:
        """One question per call: its MultiAttack sends on the images that still stand, without their questions.

        APGD-T and its DLR loss need four options; questions with fewer get APGD-CE and Square.
        """
        import torchattacks

        stand = []
        for row in rows:
            one, target = self.pixels[row : row + 1], self.targets[row : row + 1]
            batch = self.batch.select([row])
            module = Module(self.prepared(self.vlm, batch, [self.answers[row]]), batch).eval()
            count = len(batch.questions[0].options)
            attacks = [torchattacks.APGD(module, eps=self.size.eps, steps=steps, loss="ce")]
            if count >= 4:
                attacks.append(torchattacks.APGDT(module, eps=self.size.eps, steps=max(steps // 3, 1), n_classes=count))
            attacks.append(torchattacks.Square(module, eps=self.size.eps, n_queries=self.size.queries))
            with frozen(self.vlm):
                stand.append(all(bool(self.standing(attack(one, target), [row])) for attack in attacks))
        return torch.tensor(stand)


def robust(stand: Tensor, images: Any) -> dict[str, Any]:
    """Accuracy in % with its 95% interval, by image, of (n,) questions that stand."""
    share = proportion(stand.double().numpy(), images)
    return {
        "robust": round(100 * share.value, 1),
        "95%": f"[{100 * share.low:.1f}, {100 * share.high:.1f}]",
        "n": share.n,
    }


def found_by_none_else(found: dict[str, Tensor], name: str) -> Tensor:
    """(n,) questions that every other attack leaves standing."""
    return torch.stack([stand for other, stand in found.items() if other != name]).all(dim=0)


def spread(places: Sequence[int], count: int) -> list[int]:
    """`count` of the places, evenly, so that all modalities are there."""
    return [places[i * len(places) // count] for i in range(count)] if len(places) > count else list(places)


def timed(ways: dict[str, Way], rounds: int, clock: Clock) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Seconds of every round, the ways taking turns, and what each found in the last one."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    stand = {}
    for number in range(rounds):
        torch.manual_seed(number)  # the peers draw from the global streams
        np.random.seed(number)
        for name, way in ways.items():
            began = clock()
            stand[name] = way()
            seconds[name].append(clock() - began)
    return seconds, stand


def table(rows: list[dict[str, Any]], columns: Sequence[str]) -> str:
    width = {c: max(len(c), *(len(str(row[c])) for row in rows)) for c in columns}
    lines = ["  ".join(f"{c:<{width[c]}}" for c in columns)]
    return "\n".join(lines + ["  ".join(f"{row[c]!s:<{width[c]}}" for c in columns) for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entry", action="append", help="default: sft and safemed-r1")
    parser.add_argument("--quick", action="store_true", help="sft, 8 questions, PGD-10 x 2, one round: under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, the tables on stderr")
    parser.add_argument("--only", choices=("speed", "strength"), help="one of the two tables")
    parser.add_argument(
        "--module", action="append", choices=(*MODULES, LENT), help="that peers climb; default the first two"
    )
    parser.add_argument("--questions", type=int, help="attacked; default 32, and 8 with --quick")
    parser.add_argument("--rounds", type=int, help="default 5, and 1 with --quick")
    parser.add_argument("--cpu-time", action="store_true", help="processor seconds, for a machine that is not idle")
    given = parser.parse_args()
    torch.set_num_threads(1)
    quick = given.quick
    count = given.questions or (8 if quick else 32)
    pgd, rest = ((10, 2), (10, 20, 1)) if quick else ((40, 5), (50, 500, 5))
    size = Size(
        count,
        2 if quick else count,
        *pgd,
        rest[0],
        rest[1],
        given.rounds or rest[2],
        4 / 255,
        tuple(given.module or MODULES),
    )
    clock = time.process_time if given.cpu_time else time.perf_counter
    cases, works, shares, strengths = [], {}, {}, []
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for entry in given.entry or (["sft"] if quick else ["sft", "safemed-r1"]):
            bench = Bench(entry, size, clock)
            if given.only != "strength":
                found, works[entry], shares[entry] = bench.speed()
                cases += [case.row() for case in found]
            if given.only != "speed" and not quick:
                strengths += bench.strength()
    print(f"eps 4/255, one thread, median of {size.rounds}", file=sys.stderr if given.json else sys.stdout)
    tables = [table(rows, [*rows[0]]) for rows in (cases, strengths) if rows]
    tables += [
        f"{entry}: forward passes a step: { {k: round(v, 2) for k, v in w.items()} }\n"
        f"{entry}: PGD steps that are taken, of all questions' in all restarts: {shares[entry]:.1%}"
        for entry, w in works.items()
    ]
    print("\n\n".join(tables), file=sys.stderr if given.json else sys.stdout)
    if given.json:
        print(json.dumps({"cases": cases, "strength": strengths, "forwards_per_step": works, "steps_taken": shares}))


if __name__ == "__main__":
    main()
