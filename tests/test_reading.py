"""The images of a worker's jobs, read ahead of the job that shows them."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from safemed_bench.core.types import Question
from safemed_bench.run import reading
from safemed_bench.run.messages import Job, Settings
from safemed_bench.run.reading import Images, read_canvases

SIDE = 24


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    """Twelve on ten pictures; the fourth file is no image, the eighth is not there."""
    draw, asked = np.random.default_rng(0), []
    for i in range(12):
        path = tmp_path / f"{i % 10}.png"
        Image.fromarray(draw.integers(0, 256, (30, 20 + i, 3), dtype=np.uint8)).save(path)
        asked.append(Question(f"q{i}", str(path), "", "?", ("a", "b"), 0, "CT", "t", "s", "test"))
    (tmp_path / "3.png").write_bytes(b"no image")
    (tmp_path / "7.png").unlink()
    return asked


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were opened, in order."""
    names = list[str]()
    load = reading.load_canvas

    def counted(path: Path, *how: object) -> object:
        names.append(path.stem)
        return load(path, *how)

    monkeypatch.setattr(reading, "load_canvas", counted)
    return names


def job(questions: list[Question], side: int | None = None, donors: list[Question] | None = None) -> Job:
    model = SimpleNamespace(name="toy", resolution=side)
    return Job(model, "toy/clean", "clean", "clean", "0000", (), tuple(questions), tuple(donors or ()))


def images(tmp_path: Path, readers: int = 1) -> Images:
    return Images(Settings(tmp_path, SIDE, "pad", "fp32", None), readers)


@pytest.mark.parametrize("readers", [1, 4])
@pytest.mark.parametrize("guess", ["right", "wrong", "half", "none", "other side"])
def test_whatever_was_expected_a_job_gets_its_own_images(
    questions: list[Question], tmp_path: Path, readers: int, guess: str
) -> None:
    first, second = job(questions[:5]), job(questions[5:])
    ahead = {
        "right": second,
        "wrong": first,
        "half": job(questions[3:8]),
        "none": None,
        "other side": job(questions, 9),
    }
    reader = images(tmp_path, readers)
    for present, following in ((first, ahead[guess]), (second, None)):
        reader.expect(following)
        found, problems = reader.read(present)
        plain, said = read_canvases(present.questions, SIDE, "pad")
        assert [*found] == [*plain] and problems == said
        assert all(np.array_equal(found[i], plain[i]) for i in plain)
    reader.close()


def test_the_next_images_are_read_while_nobody_waits_for_them(
    questions: list[Question], tmp_path: Path, opened: list[str]
) -> None:
    reader = images(tmp_path)
    reader.expect(job(questions[4:7]))
    reader.read(job(questions[:2]))
    for future in reader._begun.values():
        future.result(timeout=30)
    assert opened == ["0", "1", "4", "5", "6"]
    reader.read(job(questions[4:7]))
    assert len(opened) == 5


def test_nobody_waits_for_images_that_were_expected_in_vain(
    questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str]
) -> None:
    """The one that is being read is; the others are given up, and read after all where they are shown later."""
    counted, begun, go_on = reading.load_canvas, threading.Event(), threading.Event()

    def slow(path: Path, *how: object) -> object:
        if path.stem == "4":
            begun.set()
            go_on.wait(30)
        return counted(path, *how)

    monkeypatch.setattr(reading, "load_canvas", slow)
    reader = images(tmp_path)
    reader.expect(job(questions[4:7]))
    reader.read(job(questions[:1]))
    assert begun.wait(30)
    reader.expect(job(questions[5:6]))
    threading.Timer(0.2, go_on.set).start()
    reader.read(job(questions[1:3]))
    assert "6" not in opened
    reader.expect(None)
    assert len(reader.read(job(questions[4:7]))[0]) == 3
    assert sorted(opened) == ["0", "1", "2", "4", "4", "5", "6"]


def test_an_image_of_many_questions_and_of_the_next_job_is_read_once(
    questions: list[Question], tmp_path: Path, opened: list[str]
) -> None:
    """The tenth and eleventh question are on the pictures of the first two."""
    reader = images(tmp_path)
    shown = [questions[0], questions[10], questions[1], questions[11]]
    for _ in range(2):
        reader.expect(job(shown))
        assert len(reader.read(job(shown))[0]) == 4
    assert sorted(opened) == ["0", "1"]


def test_of_old_jobs_nothing_is_held(questions: list[Question], tmp_path: Path) -> None:
    reader = images(tmp_path)
    for start in range(0, 9, 3):
        reader.expect(job(questions[start + 3 : start + 6]))
        reader.read(job(questions[start : start + 3]))
        assert len(reader._begun) <= 3
    reader.expect(None)
    reader.read(job(questions[:3]))
    assert not reader._begun


def test_of_a_shuffled_job_the_images_of_others_are_read(questions: list[Question], tmp_path: Path) -> None:
    reader = images(tmp_path)
    shuffled = job(questions[:2], donors=questions[4:6])
    reader.expect(shuffled)
    reader.read(job(questions[:2]))
    found, _ = reader.read(shuffled)
    assert all(np.array_equal(found[i], read_canvases(questions[4:6], SIDE, "pad")[0][i]) for i in range(2))


def test_an_error_in_between_is_no_error_for_good(
    questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a broken file, which is told of its question: the whole job fails, and the second try reads anew."""
    load, broken = reading.load_canvas, threading.Event()
    broken.set()

    def flaky(path: Path, *how: object) -> object:
        if broken.is_set():
            raise MemoryError
        return load(path, *how)

    monkeypatch.setattr(reading, "load_canvas", flaky)
    reader = images(tmp_path)
    with pytest.raises(MemoryError):
        reader.read(job(questions[:2]))
    broken.clear()
    assert len(reader.read(job(questions[:2]))[0]) == 2


def test_what_is_known_to_be_broken_is_not_opened(questions: list[Question], tmp_path: Path, opened: list[str]) -> None:
    known = replace(questions[0], image_error="0.png: cut off")
    assert images(tmp_path).read(job([known, questions[0]]))[1] == {0: "0.png: cut off"}
    assert opened == ["0"]


def test_nothing_is_read_after_the_end(questions: list[Question], tmp_path: Path, opened: list[str]) -> None:
    reader = images(tmp_path)
    reader.read(job(questions[:1]))
    reader.close()
    with pytest.raises(RuntimeError):
        reader.read(job(questions[1:2]))
    assert opened == ["0"]
