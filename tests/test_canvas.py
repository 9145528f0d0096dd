"""An image file to the canvas that models are shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from safemed_bench.core.errors import DataError
from safemed_bench.datasets.images import load_canvas


def test_canvas_pads_or_stretches_and_leaves_its_own_size_alone(tmp_path: Path) -> None:
    exact = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(exact).save(tmp_path / "a.png")
    assert np.array_equal(load_canvas(tmp_path / "a.png", 16), exact)
    Image.new("RGB", (40, 20), (200, 100, 50)).save(tmp_path / "wide.png")
    padded = load_canvas(tmp_path / "wide.png", 16)
    assert padded.shape == (16, 16, 3) and padded.dtype == np.uint8
    assert not padded[:4].any() and not padded[12:].any() and (padded[4:12] == (200, 100, 50)).all()
    assert (load_canvas(tmp_path / "wide.png", 16, "stretch") == (200, 100, 50)).all()
    Image.new("RGB", (1000, 1), (9, 9, 9)).save(tmp_path / "line.png")
    assert load_canvas(tmp_path / "line.png", 16).any()


def test_canvas_of_odd_modes(tmp_path: Path) -> None:
    deep = np.array([[0, 32768], [65535, 257]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert load_canvas(tmp_path / "deep.png", 2)[..., 0].tolist() == [[0, 128], [255, 1]]
    Image.fromarray(np.array([[-1.0, 3.0]], dtype=np.float32)).save(tmp_path / "float.tiff")
    assert load_canvas(tmp_path / "float.tiff", 2, "stretch")[0, :, 0].tolist() == [0, 255]
    clear = Image.new("RGBA", (2, 2), (255, 255, 255, 0))
    clear.putpixel((0, 0), (10, 20, 30, 255))
    clear.save(tmp_path / "clear.png")
    assert load_canvas(tmp_path / "clear.png", 2).tolist() == [[[10, 20, 30], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]]
    Image.new("RGB", (2, 2), (7, 8, 9)).quantize(4).save(tmp_path / "palette.png")
    assert (load_canvas(tmp_path / "palette.png", 2) == (7, 8, 9)).all()
    turned = Image.new("RGB", (4, 2))
    turned.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    assert load_canvas(tmp_path / "turned.png", 4)[0, 2].tolist() == [255, 255, 255], "rotated by 90 degrees, padded"


def test_canvas_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png: image file not found"):
        load_canvas(tmp_path / "gone.png", 8)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(DataError, match=r"bad\.png: image cannot be read"):
        load_canvas(tmp_path / "bad.png", 8)
    with pytest.raises(DataError, match="cannot be read"):
        load_canvas(tmp_path, 8)
