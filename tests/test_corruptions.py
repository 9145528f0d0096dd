"""Corruptions: what each does to a picture, which modality it belongs to, and how a suite names them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safemed_bench.core import registry
from safemed_bench.core.errors import SuiteError, UsageError
from safemed_bench.core.types import MODALITIES
from safemed_bench.corruptions import CORRUPTIONS, SEVERITIES, build_corruption, chosen, for_modality, modalities_of
from safemed_bench.suite import load_suite
from safemed_bench.suite.schema import ConditionSpec

SUITE = "models: [{{name: m, path: /weights}}]\nconditions:\n  - {condition}\n"


def canvases(side: int, count: int = 8) -> list[np.ndarray]:
    """(3, side, side) uint8: smooth colours with a sharp bright square, each different."""
    draw = np.random.default_rng(0)
    made = []
    for _ in range(count):
        coarse = Image.fromarray(draw.integers(60, 200, (5, 5, 3), dtype=np.uint8))
        image = np.array(coarse.resize((side, side), Image.Resampling.BICUBIC))
        top, left = draw.integers(side // 8, side // 2, 2)
        image[top : top + side // 4, left : left + side // 4] = 240
        made.append(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return made


@pytest.mark.parametrize("side", [64, 384])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_repeats_and_grows_with_its_severity(name: str, side: int) -> None:
    corrupt, images = build_corruption(name), canvases(side)
    distances = []
    for severity in SEVERITIES:
        made = [corrupt(image, severity, seed) for seed, image in enumerate(images)]
        assert all(m.dtype == np.uint8 and m.shape == i.shape for m, i in zip(made, images, strict=True))
        assert np.array_equal(made[0], corrupt(images[0], severity, 0)), "the same seed, the same picture"
        distances.append(np.mean([np.abs(m - i.astype(float)).mean() for m, i in zip(made, images, strict=True)]))
    assert distances[0] > 0 and np.all(np.diff(distances) > 0), distances
    assert np.array_equal(images[0], canvases(side)[0]), "the canvas itself is left alone"


@pytest.mark.parametrize("name", ["gaussian_noise", "motion_blur", "bias_field", "hair", "bubbles", "glare"])
def test_another_seed_is_another_picture(name: str) -> None:
    (image, *_), corrupt = canvases(64), build_corruption(name)
    assert not np.array_equal(corrupt(image, 3, 1), corrupt(image, 3, 2))


@pytest.mark.parametrize(
    "name", ["gaussian_blur", "defocus_blur", "motion_blur", "vignetting", "hair", "bubbles", "glare"]
)
def test_a_severity_means_the_same_at_every_size(name: str) -> None:
    """Shown small and enlarged or shown large, it is the same picture but for what pixels cannot show."""
    corrupt = build_corruption(name)
    for seed, large in enumerate(canvases(256, 4)):
        small = large.reshape(3, 128, 2, 128, 2).mean(axis=(2, 4)).round().astype(np.uint8)
        after = corrupt(large, 4, seed).reshape(3, 128, 2, 128, 2).mean(axis=(2, 4))
        change = np.abs(after - small).mean()
        assert np.abs(after - corrupt(small, 4, seed)).mean() < 0.25 * change


def test_what_some_of_them_are() -> None:
    flat = np.full((3, 96, 96), 100, np.uint8)
    assert np.array_equal(build_corruption("contrast")(flat, 5, 0), flat)
    for name in ("gaussian_blur", "defocus_blur", "motion_blur", "motion_ghosting", "pixelate", "jpeg"):
        assert np.abs(build_corruption(name)(flat, 5, 0) - 100.0).max() <= 1, "what is flat stays flat, to the edge"
    for name in ("rician_noise", "shot_noise"):
        made = build_corruption(name)(flat, 1, 0)
        assert np.array_equal(made[0], made[1]), "a grey picture stays grey"
    black = np.zeros((3, 96, 96), np.uint8)
    assert build_corruption("rician_noise")(black, 1, 0).mean() > 5, "it brightens the background"
    assert (
        not build_corruption("speckle_noise")(black, 5, 0).any()
        and not build_corruption("shot_noise")(black, 5, 0).any()
    )
    noisy = build_corruption("gaussian_noise")(np.full((3, 256, 256), 128, np.uint8), 1, 0) / 255
    assert noisy.std() == pytest.approx(0.04, rel=0.02)


def test_every_modality_has_its_own_and_none_has_anothers() -> None:
    assert "rician_noise" in for_modality("MRI") and "bias_field" in for_modality("MRI")
    assert "hair" in for_modality("Dermoscopy") and "hair" not in for_modality("CT")
    assert "speckle_noise" in for_modality("Ultrasound") and "gaussian_noise" not in for_modality("Ultrasound")
    for modality in MODALITIES:
        kinds = set(for_modality(modality))
        assert {"jpeg", "contrast", "pixelate"} < kinds and len(kinds) >= 6
    assert [*for_modality("Endoscopy")] == ["contrast", "jpeg", "pixelate"]
    told = {modality for info in CORRUPTIONS.values() for modality in info.modalities}
    assert told <= set(MODALITIES)


def test_the_readme_has_the_table() -> None:
    text = (Path(__file__).parents[1] / "docs" / "corruptions.md").read_text()
    for modality in MODALITIES:
        (row,) = re.findall(rf"^\| {modality} \| (.*) \|$", text, re.MULTILINE)
        own = [name for name in for_modality(modality) if CORRUPTIONS[name].modalities]
        assert re.findall(r"`(\w+)`", row) == own


def test_a_plugin_is_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from safemed_bench.corruptions.base import Corruption

    class Inverted(Corruption):
        modalities = ("X-Ray",)
        levels = (0.2, 0.4, 0.6, 0.8, 1.0)

        def apply(self, image: Any, level: float, draw: np.random.Generator) -> Any:
            return (1 - level) * image + level * (1 - image)

    class Broken(Inverted):
        def apply(self, image: Any, level: float, draw: np.random.Generator) -> Any:
            return image[:2]

    "jpeg" in registry.corruptions  # noqa: B015  ours are registered first
    monkeypatch.setattr(registry.corruptions, "_items", dict(registry.corruptions._items))
    registry.corruptions.register("inverted")(Inverted)
    assert modalities_of("inverted") == ("X-Ray",) and "inverted" in for_modality("X-Ray")
    assert "inverted" not in for_modality("CT") and list(chosen("modality"))[-1] == "inverted"
    image = canvases(32, 1)[0]
    assert np.array_equal(build_corruption("inverted")(image, 5, 0), 255 - image)
    with pytest.raises(ValueError, match="Broken made of"):
        Broken()(image, 1, 0)
    for severity in (0, 6):
        with pytest.raises(ValueError, match="severity must be one of"):
            Inverted()(image, severity, 0)


# --- how a suite names them ---


def test_what_a_suite_may_say() -> None:
    every = ConditionSpec.model_validate({"corruption": "modality"})
    assert every.severities == SEVERITIES and every.label == "corruption"
    one = ConditionSpec.model_validate({"corruption": "jpeg", "severities": [5, 1], "models": "bare"})
    assert one.corruption == ("jpeg",) and one.label == "corruption[jpeg]"
    assert chosen("modality")["hair"] == ("Dermoscopy",) and chosen("modality")["jpeg"] == ()
    assert chosen("all") == dict.fromkeys(CORRUPTIONS, ()) and chosen(["hair"]) == {"hair": ("Dermoscopy",)}


@pytest.mark.parametrize(
    "condition, words",
    [
        ("{corruption: jpg}", "unknown corruption 'jpg'. Did you mean 'jpeg'?"),
        ("{corruption: [jpeg, hairs]}", "unknown corruption 'hairs'. Did you mean 'hair'?"),
        ("{corruption: []}", "must be `modality`, `all`, a corruption, or a list of corruptions"),
        ("{corruption: 3}", "must be `modality`, `all`, a corruption, or a list of corruptions"),
        ("{corruption: jpeg, severities: [0]}", "a severity is one of 1, 2, 3, 4, 5, not 0"),
        ("{corruption: jpeg, severities: [6]}", "a severity is one of 1, 2, 3, 4, 5, not 6"),
        ("{corruption: jpeg, severities: [2, 2]}", "the same severity stands twice"),
        ("{corruption: jpeg, severities: []}", "must not be empty"),
        ("{corruption: jpeg, severity: [2]}", "unknown key. Did you mean 'severities'?"),
        ("{corruption: jpeg, steps: 3}", "corruption takes no steps"),
        ("{attack: pgd, severities: [2]}", "attack takes no severities"),
        ("{attack: pgd, name: corruption}", "would be taken for another row"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, condition: str, words: str) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE.format(condition=condition))
    with pytest.raises(SuiteError) as caught:
        load_suite(path, (), {})
    found = [problem for problem in caught.value.problems if words in problem.message]
    assert found and found[0].line == 3, caught.value.problems


def test_an_unknown_one_says_what_was_meant() -> None:
    with pytest.raises(UsageError, match=r"unknown corruption 'glaer'\. Did you mean 'glare'\?"):
        build_corruption("glaer")


def test_a_suite_reads_itself_back(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE.format(condition="{corruption: [jpeg, hair], severities: [2, 4]}") + "  - clean\n")
    suite = load_suite(path, (), {})
    assert suite.to_dict()["conditions"][0] == {"corruption": ["jpeg", "hair"], "severities": [2, 4]}
    assert type(suite).model_validate(suite.to_dict()) == suite


def test_a_gate_may_hold_one_of_them(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    text = SUITE.format(condition="{corruption: jpeg, severities: [3]}")
    path.write_text(f"{text}gate: [{{condition: 'corruption[jpeg]@3'}}]\n")
    assert load_suite(path, (), {}).gate[0].condition == "corruption[jpeg]@3"
    path.write_text(f"{text}gate: [{{condition: 'corruption[jpeg]@4'}}]\n")
    with pytest.raises(SuiteError, match=r"Did you mean 'corruption\[jpeg\]@3'"):
        load_suite(path, (), {})


def test_the_catalogue_imports_neither_torch_nor_scipy() -> None:
    code = (
        "import sys; from safemed_bench.corruptions import for_modality; print(*for_modality('MRI')); "
        "print('scipy' in sys.modules, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "motion_ghosting" in out and out.endswith("False False\n")
