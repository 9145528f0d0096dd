"""What a question is asked under: clean, blank, shuffled, noise, corruption, attack, probes. A chunk in, records out.

Imported by worker processes only, since it needs torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attacks import build_strike, fitted_on
from ..attacks.base import AttackResult
from ..attacks.external import External
from ..attacks.threat import check, norms, quantize, random_start
from ..core.seeds import derive_seed
from ..core.types import JUDGE_DRAWS, Answer, FitSet, Question, Record, ThreatModel, Unit
from ..models.base import Batch, VisionLanguageModel
from . import artefacts, certificates, corrupted, fitting, probes
from .batching import BatchSizer
from .messages import Job, Settings
from .reading import Images, read_canvases

BLANK_LEVEL = 128
"""`blank` shows a constant mid-grey image: no data set's black border, no dermoscopy white, just no picture."""

NOT_JUDGED = "the saved image is not the one that was judged"


@dataclass
class Bench:
    """One loaded model at work on jobs.

    Clean answers are kept for the attacks on the same questions. They are computed per chunk position in the same
    batches every time, so that it makes no difference whether they were kept or are computed again.
    """

    model: VisionLanguageModel
    settings: Settings
    sizer: BatchSizer
    images: Images
    _clean: dict[tuple[str, ...], list[Answer]] = field(default_factory=dict)

    def run(self, job: Job) -> tuple[Record, ...]:
        """A record for every unit of `job`, in order. A question whose image cannot be read gives an error record."""
        began = time.perf_counter()
        shown, problems = self.images.read(job)
        if job.donors:
            problems |= {i: q.image_error for i, q in enumerate(job.questions) if q.image_error}
        good = [i for i in range(len(job.units)) if i not in problems]
        records: dict[int, Record] = {i: job.record(i, error=text) for i, text in problems.items()}
        if good:
            scene = Scene(job, tuple(good), np.stack([shown[i] for i in good]))
            records |= dict(zip(good, self._measure(scene), strict=True))
        seconds = round((time.perf_counter() - began) / len(job.units), 6)
        return tuple(replace(records[i], seconds=seconds) for i in range(len(job.units)))

    def _measure(self, scene: Scene) -> list[Record]:
        if scene.job.kind == "certify":
            return certificates.measure(self.model, self.sizer, self.settings.folder, scene)
        if scene.job.kind in ("repeat", "gradient"):
            return self._probe(scene)
        return self._attack(scene) if scene.job.kind == "attack" else self._ask(scene)

    def _ask(self, scene: Scene) -> list[Record]:
        """The deployed path on images that nobody optimised."""
        images = _show(scene)
        if scene.job.kind == "clean":
            return [scene.record(k, **_verdict(scene, k, a)) for k, a in enumerate(self.clean_answers(scene))]
        answers = self._answers(scene, scene.job.kind, images)
        records = []
        for k, answer in enumerate(answers):
            values = _verdict(scene, k, answer)
            if scene.job.kind in ("noise", "corruption"):
                linf, l2 = norms(_tensor(scene.canvas[k : k + 1]), _tensor(images[k : k + 1]))
                values |= {"linf": float(linf), "l2": float(l2)}
            if scene.job.donors:
                values["extra"] = {"donor": scene.job.donors[scene.index[k]].id}
            records.append(scene.record(k, **values))
        return records

    def _probe(self, scene: Scene) -> list[Record]:
        """The verdict of a fresh clean pass, and what the probe found in its extra."""
        found: list[tuple[Answer, dict[str, Any]]] = []

        def work(batch: Batch, rows: Sequence[int]) -> None:
            found.extend(
                probes.repeat(self.model, batch) if scene.job.kind == "repeat" else probes.gradient(self.model, batch)
            )

        self._batches(scene, scene.job.kind, work)
        return [scene.record(k, **_verdict(scene, k, answer), extra=extra) for k, (answer, extra) in enumerate(found)]

    def _attack(self, scene: Scene) -> list[Record]:
        clean = self.clean_answers(scene)
        strike = self._strike(scene)
        results: list[tuple[AttackResult, int]] = []

        def work(batch: Batch, rows: Sequence[int]) -> None:
            result = strike(
                self.model,
                batch,
                scene.threat,
                generators=[generator(scene.units[k], "attack") for k in rows],
                clean_answers=[clean[k] for k in rows],
            )
            results.extend((result, place) for place in range(len(rows)))

        self._batches(scene, f"{scene.job.attack}[{scene.job.objective}]", work)
        return self._judged(scene, clean, results)

    def _strike(self, scene: Scene) -> Any:
        """What is called on a batch: the cell's attack, another entry's images, or what was fitted beforehand."""
        job, folder = scene.job, self.settings.folder
        if job.source:
            keys = [job.source.units[i].key for i in scene.index]
            return External(str(folder / artefacts.artefact_name(job.source.cell, job.source.chunk, keys)))
        if fitted_on(job.attack, dict(job.params)):
            side = job.model.resolution or self.settings.resolution

            def canvases(part: FitSet) -> np.ndarray[Any, np.dtype[np.uint8]]:
                return fitting.stacked(*read_canvases(part.questions, side, self.settings.fit))

            return fitting.universal(self.model, job, folder, canvases, self.sizer)
        return build_strike(job.attack, job.objective, dict(job.params))

    def _judged(
        self, scene: Scene, clean: Sequence[Answer], results: Sequence[tuple[AttackResult, int]]
    ) -> list[Record]:
        """Save the images, read them back, and let only what the file holds count: it must be what was judged."""
        job, folder = scene.job, self.settings.folder
        adversarial = np.stack([result.adversarial[place].numpy() for result, place in results])
        name = artefacts.artefact_name(job.cell, job.chunk, [u.key for u in scene.units])
        artefacts.save(folder, name, scene.canvas, adversarial, [q.id for q in scene.questions])
        deltas = artefacts.read(folder, name)
        final = self._sentences(scene, adversarial, [result.answers[place] for result, place in results])
        records = []
        for k, (result, place) in enumerate(results):
            measured = artefacts.measure(scene.canvas[k], deltas[k], scene.threat)
            same = np.array_equal(scene.canvas[k] + deltas[k], adversarial[k])
            told = result.problems[place] if result.problems else ""
            if problem := told or measured.problem or ("" if same else NOT_JUDGED):
                records.append(scene.record(k, error=problem, artefact=f"{name}#{k}"))
                continue
            values = _verdict(scene, k, final[k]) | _effort(result, place)
            if scene.threat.norm == "l1":
                values["extra"] |= {"l1": measured.l1}
            records.append(
                scene.record(
                    k,
                    **values,
                    clean_correct=clean[k].index == scene.questions[k].answer,
                    linf=measured.linf,
                    l2=measured.l2,
                    artefact=f"{name}#{k}",
                )
            )
        return records

    def _sentences(self, scene: Scene, images: np.ndarray[Any, Any], answers: list[Answer]) -> list[Answer]:
        """The attack's own verdicts or, of a randomised model, those of several fresh draws that it never saw."""
        if not getattr(self.model, "randomised", False):
            return answers
        draws: list[list[Answer]] = []
        for number in range(JUDGE_DRAWS):
            stream = torch.Generator().manual_seed(derive_seed("judge", self.settings.seed, number))
            draws.append(self._answers(scene, "judge", images, stream))
        moved = [not np.array_equal(image, clean) for image, clean in zip(images, scene.canvas, strict=True)]
        return [
            majority([draw[k] for draw in draws], scene.questions[k].answer) if moved[k] else answers[k]
            for k in range(len(answers))
        ]

    def clean_answers(self, scene: Scene) -> list[Answer]:
        """The deployed path on the untouched images, computed once per set of questions."""
        asked = tuple(q.id for q in scene.questions)
        if asked not in self._clean:
            self._clean[asked] = self._answers(scene, "clean", scene.canvas)
        return self._clean[asked]

    def _answers(
        self, scene: Scene, kind: str, images: np.ndarray[Any, np.dtype[np.uint8]], draws: torch.Generator | None = None
    ) -> list[Answer]:
        """The deployed path on `images`, one per question of the scene."""
        answers: list[Answer] = []

        def ask(batch: Batch, rows: Sequence[int]) -> None:
            answers.extend(self.model.answer(batch, batch.pixels, generator=draws))

        self._batches(scene, kind, ask, images)
        return answers

    def _batches(
        self,
        scene: Scene,
        kind: str,
        work: Callable[[Batch, Sequence[int]], None],
        images: np.ndarray[Any, np.dtype[np.uint8]] | None = None,
    ) -> None:
        """`work` on consecutive batches of the scene, as large as memory allows."""
        shown = scene.canvas if images is None else images

        def one(rows: Sequence[int]) -> None:
            questions = [scene.questions[k] for k in rows]
            work(self.model.prepare(questions, _tensor(shown[rows[0] : rows[-1] + 1])), rows)

        self.sizer.map(kind, range(len(scene.units)), one)


def majority(draws: Sequence[Answer], target: int) -> Answer:
    """The first of the answers that sides with most of them: right where more than half are."""
    right = 2 * sum(answer.index == target for answer in draws) > len(draws)
    return next(answer for answer in draws if (answer.index == target) == right)


@dataclass(frozen=True)
class Scene:
    """The readable questions of a job: `index` their places in it, `canvas` (N, 3, H, W) uint8 as they are shown."""

    job: Job
    index: tuple[int, ...]
    canvas: np.ndarray[Any, np.dtype[np.uint8]]

    @property
    def units(self) -> tuple[Unit, ...]:
        return tuple(self.job.units[i] for i in self.index)

    @property
    def questions(self) -> tuple[Question, ...]:
        return tuple(self.job.questions[i] for i in self.index)

    @property
    def threat(self) -> ThreatModel:
        if self.job.threat is None:
            raise ValueError(f"cell {self.job.cell} has no threat model")
        return self.job.threat

    def record(self, k: int, **values: Any) -> Record:
        return self.job.record(self.index[k], **values)


def generator(unit: Unit, stream: str) -> torch.Generator:
    """The random stream of one unit for one purpose; on the CPU, so that the device changes no draw."""
    return torch.Generator().manual_seed(derive_seed(unit.seed, stream))


def _show(scene: Scene) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(N, 3, H, W) uint8: what the model is shown instead of the clean canvas."""
    if scene.job.kind == "blank":
        return np.full_like(scene.canvas, BLANK_LEVEL)
    if scene.job.kind == "corruption":
        return corrupted.show(scene)
    if scene.job.kind != "noise":
        return scene.canvas
    canvas = _tensor(scene.canvas)
    clean = canvas.float() / 255
    delta = random_start(scene.threat, clean, [generator(unit, "noise") for unit in scene.units])
    noisy = quantize(scene.threat, canvas, clean + delta)
    check(scene.threat, canvas, noisy)
    return noisy.numpy()


def _verdict(scene: Scene, k: int, answer: Answer) -> dict[str, Any]:
    return {
        "answer": answer.index,
        "status": answer.status,
        "correct": answer.index == scene.questions[k].answer,
        "text": answer.text,
        "letter": answer.letter,
        "option_logprobs": answer.option_logprobs,
    }


def _effort(result: AttackResult, place: int) -> dict[str, Any]:
    """What the attack did for one question; nothing where the clean answer was wrong already."""
    dead, verdicts = int(result.dead_gradients[place]), int(result.verdicts[place])
    extra = dict(result.extra[place]) | ({"dead_gradients": dead} if dead else {})
    return {
        "steps": int(result.steps[place]),
        "loss_trace": result.trace(place),
        "forwards": int(result.forwards[place]),
        "backwards": int(result.backwards[place]),
        "extra": extra | ({"verdicts": verdicts} if verdicts else {}),
    }


def _tensor(images: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images))
