"""The embedded default: deterministic, balanced, blind = chance, in OmniMedVQA's layout."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safemed_bench.core.errors import DataError, UsageError
from safemed_bench.datasets import phantom
from safemed_bench.datasets.phantom import Difficulty, PhantomSpec
from safemed_bench.datasets.phantom.catalogue import DISEASES, conditions_of
from safemed_bench.datasets.phantom.design import slot
from safemed_bench.datasets.phantom.pen import Pen
from safemed_bench.datasets.phantom.signs import draw_sign

Record = dict[str, Any]
SPEC = PhantomSpec(train=96, validation=2, test=4)


def ask(split: str, n: int, seed: int = 0) -> list[Record]:
    return [record for index in range(n) for record in phantom.questions_for(seed, split, index)]


def options(record: Record) -> tuple[str, ...]:
    return tuple(record[f"option_{letter}"] for letter in "ABCD" if f"option_{letter}" in record)


@pytest.fixture(scope="module")
def train() -> list[Record]:
    return ask("train", 8 * 96 * 8)


@pytest.fixture(scope="module")
def test() -> list[Record]:
    return ask("test", 8 * 96)


# --- determinism -----------------------------------------------------------------------------------------------


def test_same_index_same_image_and_other_index_other_image() -> None:
    a, b = phantom.render(SPEC, "test", 5), phantom.render(SPEC, "test", 5)
    assert np.array_equal(a.image, b.image)
    others = [phantom.render(SPEC, "test", 13), phantom.render(replace(SPEC, seed=1), "test", 5)]
    assert not any(np.array_equal(a.image, other.image) for other in others)


def test_first_images_of_a_larger_set_are_the_smaller_set() -> None:
    small, asked_small = phantom.generate_arrays(PhantomSpec(train=1), "train", 8, workers=1)
    large, asked_large = phantom.generate_arrays(PhantomSpec(train=9), "train", 40, workers=1)
    assert np.array_equal(small, large[:8])
    assert asked_small == asked_large[: len(asked_small)]


def test_worker_processes_change_nothing() -> None:
    alone, _ = phantom.generate_arrays(SPEC, "train", 1100, workers=1)
    shared, _ = phantom.generate_arrays(SPEC, "train", 1100, workers=2)
    assert np.array_equal(alone, shared)


def test_splits_share_no_image() -> None:
    seen: dict[bytes, str] = {}
    for split in phantom.SPLITS:
        for index in range(200):
            key = phantom.render(SPEC, split, index).image.tobytes()
            assert seen.setdefault(key, split) == split and len(seen) > index
    assert len(seen) == 600


def test_fingerprint_follows_every_parameter() -> None:
    specs = [SPEC, replace(SPEC, seed=1), replace(SPEC, size=96), replace(SPEC, test=5)]
    specs.append(replace(SPEC, difficulty=Difficulty(contrast=(0.1, 0.2))))
    assert len({spec.fingerprint() for spec in specs}) == len(specs)
    assert PhantomSpec.from_mapping(json.loads(json.dumps(SPEC.to_dict()))) == SPEC


def test_a_change_of_the_generator_must_raise_its_version() -> None:
    """Trained models and cached images hang on this: whoever changes what is drawn or asked raises the version."""
    assert phantom.GENERATOR_VERSION == 3
    images = np.stack([phantom.render(PhantomSpec(), "validation", index).image for index in range(16)])
    means = [81.7, 93.0, 91.9, 100.6, 132.7, 109.4, 101.0, 157.6, 77.8, 84.9, 107.5, 96.5, 109.1, 104.4, 92.7, 141.7]
    spreads = [30.2, 10.4, 12.6, 14.6, 20.1, 33.0, 36.3, 24.4, 14.6, 42.4, 53.9, 16.1, 33.7, 32.0, 39.5, 9.8]
    assert images.mean((1, 2, 3)) == pytest.approx(means, abs=0.1)
    assert images[:, 20:44, 20:44].std((1, 2, 3)) == pytest.approx(spreads, abs=0.1)
    text = json.dumps(ask("validation", 64), sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest().startswith("6e08e01b35d6106e")


# --- balance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
def test_cases_are_exactly_balanced(split: str) -> None:
    slots = [slot(3, split, index) for index in range(8 * 24 * 4)]
    assert set(Counter((s.region, s.condition) for s in slots).values()) == {12}
    graded = Counter((s.region, s.condition, s.grade) for s in slots if s.grade is not None)
    assert set(graded.values()) == {4} and len(graded) == 16 * 3 * 3
    assert all((s.grade is None) == (s.condition == phantom.NORMAL) for s in slots)


def test_default_test_split_is_balanced_as_far_as_its_size_allows() -> None:
    slots = [slot(0, "test", index) for index in range(PhantomSpec().count("test"))]
    assert set(Counter(s.modality.name for s in slots).values()) == {100}
    for counts in (Counter((s.region, s.condition) for s in slots), Counter(s.region for s in slots)):
        assert max(counts.values()) - min(counts.values()) <= 1


def test_letters_are_exactly_balanced(test: list[Record]) -> None:
    counts: dict[tuple[str, int, str], Counter[str]] = defaultdict(Counter)
    for record in test:
        counts[record["question_type"], len(options(record)), record["dataset"]][record["gt_letter"]] += 1
    for (_, n, _), letters in counts.items():
        assert len(letters) == n and len(set(letters.values())) == 1, letters


def lookup_accuracy(
    key: Callable[[Record], Hashable], train: Sequence[Record], test: Sequence[Record]
) -> tuple[float, float]:
    """Accuracy on test of the most frequent answer of train given `key`, and its standard error under chance."""
    table: dict[Hashable, Counter[str]] = defaultdict(Counter)
    for record in train:
        table[key(record)][record["gt_answer"]] += 1
    hits = []
    for record in test:
        known = table[key(record)]
        hits.append(max(options(record), key=lambda option: known[option]) == record["gt_answer"])
    chance = [1 / len(options(record)) for record in test]
    error = float(np.sqrt(sum(p * (1 - p) for p in chance))) / len(test)
    return float(np.mean(hits) - np.mean(chance)), error


KEYS: dict[str, Callable[[Record], Hashable]] = {
    "wording": lambda r: r["question"],
    "option set": lambda r: frozenset(options(r)),
    "wording and option set": lambda r: (r["question"], frozenset(options(r))),
    "ordered options": lambda r: options(r),
    "type and first option": lambda r: (r["question_type"], options(r)[0]),
}


@pytest.mark.parametrize("name", KEYS)
def test_a_text_only_lookup_stays_at_chance(name: str, train: list[Record], test: list[Record]) -> None:
    gain, error = lookup_accuracy(KEYS[name], train, test)
    assert abs(gain) < 4 * error


def test_the_modality_tells_nothing_of_disease_and_grade(train: list[Record], test: list[Record]) -> None:
    kinds = ("Disease Diagnosis", "Lesion Grading")
    some = [[r for r in records if r["question_type"] in kinds] for records in (train, test)]
    gain, error = lookup_accuracy(lambda r: (r["modality_type"], r["question"], options(r)), *some)
    assert abs(gain) < 4 * error


def test_every_listed_option_is_equally_often_true(train: list[Record]) -> None:
    listed, true = Counter[tuple[str, int, str]](), Counter[tuple[str, int, str]]()
    for record in train:
        for option in options(record):
            listed[record["question_type"], len(options(record)), option] += 1
        true[record["question_type"], len(options(record)), record["gt_answer"]] += 1
    for key, n in listed.items():
        p = 1 / key[1]
        assert abs(true[key] / n - p) < 5 * np.sqrt(p * (1 - p) / n), key


# --- questions -------------------------------------------------------------------------------------------------


def test_questions_have_two_to_four_different_options_and_the_true_one(train: list[Record]) -> None:
    assert {len(options(r)) for r in train} == {2, 3, 4}
    for record in train:
        assert len(set(options(record))) == len(options(record))
        assert record[f"option_{record['gt_letter']}"] == record["gt_answer"]
    assert len({r["question_id"] for r in train}) == len(train)


def test_answers_follow_the_facts(test: list[Record]) -> None:
    names = {
        "Modality Recognition": "modality",
        "Anatomy Identification": "region",
        "Disease Diagnosis": "condition",
        "Lesion Grading": "grade",
    }
    assert all(r["gt_answer"] == r["facts"][names[r["question_type"]]] for r in test)
    assert all(
        set(options(r)) <= set(conditions_of(r["facts"]["region"])) for r in test if "Disease" in r["question_type"]
    )


def test_every_word_is_known_and_every_answer_is_one_word(train: list[Record]) -> None:
    assert len(phantom.WORDS) < 90 and len(set(phantom.WORDS)) == len(phantom.WORDS)
    for record in train[:6000]:
        assert all(len(phantom.words_of(option)) == 1 for option in options(record))
        for text in (record["question"], *options(record), phantom.rationale(record["facts"], record)):
            assert set(phantom.words_of(text)) <= set(phantom.WORDS), text


def test_a_rationale_ends_with_answer_and_letter_and_names_the_finding(test: list[Record]) -> None:
    for record in test:
        words = phantom.rationale(record["facts"], record).split(" ")
        assert words == phantom.words_of(" ".join(words)) and len(words) <= 22
        assert words[-2:] == [record["gt_answer"], record["gt_letter"]]
    graded = next(r for r in test if r["facts"]["grade"] == "severe" and r["question_type"] == "Disease Diagnosis")
    sign = DISEASES[graded["facts"]["region"]][graded["facts"]["condition"]]
    assert f"a large {sign.polarity} {sign.shape} ." in phantom.rationale(graded["facts"], graded)


# --- images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 128, 200])
def test_images_scale_with_the_size(size: int) -> None:
    for index in range(16):
        case = phantom.render(PhantomSpec(size=size), "test", index)
        assert case.image.shape == (size, size, 3) and case.image.dtype == np.uint8
        assert case.image.std() > 10


def test_a_larger_image_shows_the_same_scene() -> None:
    for index in range(16):
        small = phantom.render(PhantomSpec(size=64), "test", index).image.astype(float)
        large = phantom.render(PhantomSpec(size=128), "test", index).image.astype(float)
        pooled = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
        assert np.corrcoef(small.ravel(), pooled.ravel())[0, 1] > 0.85  # grain and noise are drawn anew


@pytest.mark.parametrize("shape", ["spot", "ring", "streak", "cluster"])
def test_a_sign_is_far_above_the_threat_and_grows_with_the_grade(shape: str) -> None:
    sign = next(s for signs in DISEASES.values() for s in signs.values() if s.shape == shape)
    hard = Difficulty()
    areas = []
    for low, high in (hard.radius_mild, hard.radius_moderate, hard.radius_severe):
        sizes = []
        for seed in range(40):
            pen = Pen(np.random.default_rng(seed), 64, hard, 1)
            draw_sign(pen, sign, (0.0, 0.0), low + (high - low) * seed / 39, 1.0)
            assert pen.image.max() > 0.2
            extent = np.argwhere(pen.image[0] > 0.1)
            sizes.append(float(np.linalg.norm(np.ptp(extent, axis=0))))
        areas.append(sizes)
    assert np.mean(areas[0]) < 0.8 * np.mean(areas[1]) and np.mean(areas[1]) < 0.85 * np.mean(areas[2])


def test_grades_leave_gaps() -> None:
    hard = Difficulty()
    assert hard.radius_mild[1] + 1 < hard.radius_moderate[0] and hard.radius_moderate[1] + 1 < hard.radius_severe[0]


def test_mean_brightness_does_not_tell_the_condition() -> None:
    """The best threshold on the mean of a region's images must not part normal from any one disease."""
    means: dict[tuple[str, str], list[float]] = defaultdict(list)
    for index in range(8 * 96):
        case = phantom.render(PhantomSpec(), "train", index)
        means[case.region, case.condition].append(float(case.image.mean()))
    for region, signs in DISEASES.items():
        for disease in signs:
            a, b = np.array(means[region, phantom.NORMAL]), np.array(means[region, disease])
            auc = float((a[:, None] > b[None, :]).mean())
            assert 0.1 < auc < 0.9, (region, disease, auc)


# --- on disk ---------------------------------------------------------------------------------------------------


def test_layout_on_disk(tmp_path: Any) -> None:
    spec = PhantomSpec(train=1, validation=1, test=3)
    seen: list[tuple[int, int]] = []
    phantom.prepare(tmp_path, spec, workers=1, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (40, 40)
    files = sorted((tmp_path / "QA_information" / "Open-access").glob("*.json"))
    assert len(files) == 8
    records = [record for path in files for record in json.loads(path.read_text("utf-8"))]
    keys = {"dataset", "question_id", "question_type", "question", "gt_answer", "image_path", "option_A", "option_B"}
    assert all(keys | {"modality_type", "split", "facts"} <= set(record) for record in records)
    assert Counter(r["split"] for r in records if r["question_type"] == "Modality Recognition") == {
        "train": 8,
        "validation": 8,
        "test": 24,
    }
    for record in records:
        image = np.asarray(Image.open(tmp_path / record["image_path"]))
        assert np.array_equal(image, phantom.render(spec, record["split"], phantom.index_of(record)).image)
    assert not list(tmp_path.rglob("*.tmp"))


def test_prepare_goes_on_where_it_stopped(tmp_path: Any) -> None:
    spec = PhantomSpec(train=1, validation=1, test=2)
    phantom.prepare(tmp_path, spec, ["test"], workers=1)
    (image, other), before = sorted(tmp_path.rglob("*.png"))[:2], sorted(tmp_path.rglob("*.png"))
    stamp = image.stat().st_mtime_ns
    phantom.prepare(tmp_path, spec, ["test"], workers=1)
    assert image.stat().st_mtime_ns == stamp
    manifest = tmp_path / "phantom.json"  # as an interruption leaves it: one image missing, no split complete
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "complete": []}))
    other.unlink()
    phantom.prepare(tmp_path, spec, ["test"], workers=1)
    assert other.exists() and image.stat().st_mtime_ns == stamp
    phantom.prepare(tmp_path, spec, workers=1)
    assert set(before) < set(tmp_path.rglob("*.png"))
    splits = {r["split"] for p in tmp_path.rglob("Phantom-CT.json") for r in json.loads(p.read_text())}
    assert splits == set(phantom.SPLITS)


def test_a_folder_of_other_parameters_is_refused(tmp_path: Any) -> None:
    phantom.prepare(tmp_path, PhantomSpec(test=1), ["test"], workers=1)
    with pytest.raises(DataError, match="other parameters"):
        phantom.prepare(tmp_path, PhantomSpec(test=1, seed=1), ["test"], workers=1)
    (tmp_path / "phantom.json").write_text("[]")
    with pytest.raises(DataError, match="not a phantom manifest"):
        phantom.prepare(tmp_path, PhantomSpec(test=1), ["test"], workers=1)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"seeds": 1}, "seed"),
        ({"difficulty": {"contrasts": [0, 1]}}, "contrast"),
        ({"size": 8}, "at least 32"),
        ({"test": -1}, "negative"),
    ],
)
def test_wrong_parameters_say_what_was_meant(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        PhantomSpec.from_mapping(values)
    with pytest.raises(UsageError, match="train"):
        phantom.render(SPEC, "trian", 0)


def test_no_torch_is_imported() -> None:
    code = "import sys, safemed_bench.datasets.phantom; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_speed() -> None:
    start = time.perf_counter()
    phantom.generate_arrays(SPEC, "train", 500, workers=1)
    assert time.perf_counter() - start < 5
