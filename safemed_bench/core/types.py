"""The words of the house as frozen dataclasses: questions, threat models, units, answers, records, estimates."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from fractions import Fraction
from typing import Any, Literal, get_args

MODALITIES = (
    "CT",
    "MRI",
    "X-Ray",
    "Ultrasound",
    "Dermoscopy",
    "Fundus Photography",
    "OCT",
    "Microscopy",
)
LETTERS = "ABCD"
PROBE = "probe:"
"""What the names of conditions begin with that serve the diagnostics alone and enter no table."""
FROM = "<-"
"""What stands in a condition's name between an attack and the entry whose images it shows: `pgd<-sft`."""

ATTACK_DRAWS, JUDGE_DRAWS = 3, 3
"""Of a randomised model: the attack's own draws that must all be fooled before it takes that for a success, and the
fresh draws behind the verdict on its image (METHOD, Attack 6)."""

Norm = Literal["linf", "l2", "l1"]
Status = Literal["valid", "invalid", "truncated", "abstain"]


@dataclass(frozen=True, slots=True)
class Question:
    """One VQA item.

    `image` is an absolute path; `image_sha256` is of the file's bytes, "" where it could not be read and
    `image_error` then says why. `answer` is the index of the true option in `options` (2 to 4 of them).
    `modality` is one of MODALITIES or the data set's own word where it is none of them.
    """

    id: str
    image: str
    image_sha256: str
    question: str
    options: tuple[str, ...]
    answer: int
    modality: str
    question_type: str
    source: str
    split: str
    image_error: str = ""

    @property
    def chance(self) -> float:
        return 1 / len(self.options)


@dataclass(frozen=True, slots=True)
class ThreatModel:
    """What an adversary may do to the [0, 1] image that the processor is given.

    eps is on the [0, 1] pixel scale, in `norm` over all C*H*W values of one image; the final image is always on the
    8-bit grid, inside the ball. The tensor side (project, start, quantize) is in attacks/threat.py.
    """

    norm: Norm
    eps: float
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, not {self.norm!r}")
        if not self.eps >= 0:
            raise ValueError(f"eps must be >= 0, not {self.eps}")

    @property
    def label(self) -> str:
        """`linf:4/255`, `l2:0.5`, `l1:12`: how conditions are named."""
        eps = f"{self.eps:g}" if self.norm == "l1" else format_eps(self.eps)  # a sum over pixels: 12, not 3060/255
        return f"{self.norm}:{eps}"


def format_eps(eps: float) -> str:
    """`8/255` where eps is a whole or half multiple of 1/255, else a short decimal."""
    for denominator in (255, 510):
        numerator = eps * denominator
        if eps and abs(numerator - round(numerator)) < 1e-6:
            fraction = Fraction(round(numerator), denominator)
            if denominator == 255 or fraction.denominator == 510:
                return f"{round(numerator)}/{denominator}"
    return f"{eps:g}"


@dataclass(frozen=True, slots=True)
class Unit:
    """One question in one cell. `key` is a hash of everything that can change the record."""

    key: str
    question_id: str
    cell: str
    seed: int


@dataclass(frozen=True, slots=True)
class FitSet:
    """Questions of one modality that an attack is fitted on; none of them is asked. `key` is a hash of everything that
    can change the fit."""

    key: str
    modality: str
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said.

    index: the option the deployed path answers, None where status is not "valid".
    option_logprobs: log-probability of each option's letter at the answer position, one per option.
    text, tokens: the generated continuation. letter: the option extracted from `text`, None where there is none;
    equals `index` for entries that answer by generation.
    """

    index: int | None
    status: Status
    text: str
    option_logprobs: tuple[float, ...] = ()
    letter: int | None = None
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """What one unit gave. A record with `error` has no verdict: it is MISSING, never 0% or 100%.

    linf, l2: norms of the saved 8-bit perturbation, [0, 1] pixel scale. loss_trace: mean objective per step of this
    question. forwards, backwards: passes spent on this question by the attack.
    clean_correct: verdict on the untouched image (attack conditions), so that worst cases can be formed.
    radius, abstain, samples: of a certificate: its L2 radius on the [0, 1] pixel scale, whether no answer could be
    certified, and the answers on noisy copies that it took, selection included.
    """

    key: str
    cell: str
    model: str
    condition: str
    question_id: str
    modality: str
    question_type: str
    image_sha256: str
    n_options: int
    target: int
    answer: int | None = None
    status: Status | None = None
    correct: bool | None = None
    clean_correct: bool | None = None
    text: str = ""
    letter: int | None = None
    option_logprobs: tuple[float, ...] = ()
    linf: float | None = None
    l2: float | None = None
    steps: int | None = None
    loss_trace: tuple[float, ...] = ()
    forwards: int = 0
    backwards: int = 0
    radius: float | None = None
    abstain: bool | None = None
    samples: int | None = None
    artefact: str = ""
    seconds: float = 0.0
    error: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Field -> value, in the order of the fields; `extra` is the record's own and must not be changed."""
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Record:
        """Unknown fields are left out. Raises TypeError where one that has no default is missing."""
        values = {name: data[name] for name in _FIELDS if name in data}
        for name in ("option_logprobs", "loss_trace"):
            values[name] = tuple(values.get(name, ()))
        return cls(**values)


_FIELDS = tuple(f.name for f in fields(Record))
REQUIRED = frozenset(f.name for f in fields(Record) if f.default is MISSING and f.default_factory is MISSING)
"""Fields without which a line of a journal is no record."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A proportion or mean with its 95% interval; never shown without n."""

    value: float
    low: float
    high: float
    n: int
    method: str
