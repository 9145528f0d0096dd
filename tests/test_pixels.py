"""The pixel map equals the real image processor, has the right gradient, and refuses what it cannot describe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, NATIVE, QWEN, TILING, build, lacks
from transformers import AutoModelForImageTextToText
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from safemed_bench.core.errors import ModelError
from safemed_bench.models.pixels import PixelMap, image_processor_call
from safemed_bench.models.processors import load_processor


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    if reason := lacks(request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: build(name, tmp_path_factory.mktemp(name)) for name in FAMILIES if not lacks(name)}


def images_of(side, count=4, seed=1):
    return list(np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


def as_pixels(images, dtype=torch.float32):
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(dtype) / 255


def probe(folder, side):
    call = image_processor_call(load_processor(folder))
    return call, PixelMap.probe(call, (side, side))


@pytest.mark.parametrize("multiple", [1, 1.5, 3])
def test_map_equals_processor(family, folders, multiple):
    if multiple != 1 and family not in QWEN:
        return  # one fixed size
    side = int(NATIVE[family] * multiple)
    call, pixel_map = probe(folders[family], side)
    images = images_of(side)
    expected = call(images)
    values = pixel_map(as_pixels(images))
    assert values.shape == expected["pixel_values"].shape
    assert (values - expected["pixel_values"]).abs().max() <= 1e-5
    extras = pixel_map.extras(len(images))
    assert set(extras) == set(expected) - {"pixel_values"}
    assert all(torch.equal(extras[k], expected[k]) for k in extras)


def test_rectangular_canvas(folders):
    call = image_processor_call(load_processor(folders["qwen3_vl"]))
    pixel_map = PixelMap.probe(call, (64, 96))
    images = [np.ascontiguousarray(i[:64]) for i in images_of(96)]
    assert (pixel_map(as_pixels(images)) - call(images)["pixel_values"]).abs().max() <= 1e-5


def test_backward_is_the_adjoint_of_the_map(family, folders):
    """The hand-written backward against autograd through the definition, in float64."""
    side = NATIVE[family]
    _, pixel_map = probe(folders[family], side)
    assert bool(pixel_map.resizes) == (family in TILING)
    pixels = torch.rand(2, 3, side, side, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(pixel_map(pixels).shape, dtype=torch.float64)
    (ours,) = torch.autograd.grad((pixel_map(pixels) * weight).sum(), pixels)
    index = (pixel_map.source[:, None] * pixel_map.run + torch.arange(pixel_map.run)).flatten()
    buffer = pixels.flatten(1)
    for resize in pixel_map.resizes:
        buffer = torch.cat([buffer, resize(buffer)], 1)
    plain = buffer[:, index] * pixel_map.scale.double() + pixel_map.shift.double()
    (theirs,) = torch.autograd.grad((plain.reshape(weight.shape) * weight).sum(), pixels)
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-9)


def test_gradient_equals_finite_difference_through_the_model(family, folders):
    side = NATIVE[family]
    processor = load_processor(folders[family])
    pixel_map = PixelMap.probe(image_processor_call(processor), (side, side)).smooth()
    model = AutoModelForImageTextToText.from_pretrained(folders[family], dtype=torch.float64).eval()
    images = images_of(side, 1)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = dict(processor(images=images, text=[text], return_tensors="pt"))
    inputs = {k: v for k, v in inputs.items() if k not in ("pixel_values", "labels", "num_patches")}

    def loss(pixels):
        return model(**inputs, pixel_values=pixel_map(pixels)).logits[0, -1].log_softmax(-1)[40]

    pixels = as_pixels(images, torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(pixels), pixels)
    norm = gradient.norm()
    assert norm > 1e-3
    step = 1e-3  # between the float32 rounding inside the norms of most families and the curvature of the loss
    with torch.no_grad():
        numeric = (loss(pixels + step * gradient / norm) - loss(pixels - step * gradient / norm)) / (2 * step)
    assert abs(numeric - norm) / norm < 1e-3


@pytest.mark.parametrize(
    ("name", "side", "native"),
    [
        ("qwen2_vl", 60, 64),
        ("llava", 96, 56),
        ("gemma3", 48, 56),
        ("internvl", 48, 56),
        ("llava_next", 80, 112),
        ("idefics3", 56, 112),
    ],
)
def test_refuses_a_resizing_processor_and_names_a_size_that_fits(folders, name, side, native):
    with pytest.raises(ModelError, match=rf"{side}x{side}.*set the resolution to {native}"):
        probe(folders[name], side)


def affine(images):
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_refuses_a_smoothing_processor_of_the_same_size():
    def call(images):
        return {"pixel_values": torch.nn.functional.avg_pool2d(affine(images), 3, 1, 1)}

    with pytest.raises(ModelError, match="more than copy and normalise"):
        PixelMap.probe(call, (16, 16))


def test_refuses_a_processor_that_is_wrong_in_a_few_pixels_only():
    """Square root in a single pixel: constants at 0 and 255 and almost all of the image agree with an affine."""

    def call(images):
        values = affine(images)
        values[:, 1, 3, 5] = ((values[:, 1, 3, 5] + 1) / 2).sqrt() * 2 - 1
        return {"pixel_values": values}

    with pytest.raises(ModelError, match="more than copy and normalise"):
        PixelMap.probe(call, (16, 16))


def test_refuses_normalisation_by_the_image_itself():
    def call(images):
        values = affine(images)
        return {"pixel_values": values - values.mean((1, 2, 3), keepdim=True)}

    with pytest.raises(ModelError):
        PixelMap.probe(call, (16, 16))


def test_refuses_extras_that_depend_on_content():
    def call(images):
        return {"pixel_values": affine(images), "tiles": torch.tensor([[int(i.mean() > 127)] for i in images])}

    with pytest.raises(ModelError, match=r"'tiles'.*content"):
        PixelMap.probe(call, (16, 16))


def test_a_failing_processor_is_a_model_error():
    def call(images):
        raise ValueError("absolute aspect ratio must be smaller than 200")

    with pytest.raises(ModelError, match="aspect ratio"):
        PixelMap.probe(call, (16, 16))


def test_padding_and_channel_order():
    """Constant padding carries no gradient; swapped channels and a crop are still a gather."""
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)

    def call(images):
        values = processor([np.ascontiguousarray(i[..., ::-1]) for i in images], return_tensors="pt")["pixel_values"]
        return {"pixel_values": torch.nn.functional.pad(values[..., 2:], (0, 5), value=0.25)}

    pixel_map = PixelMap.probe(call, (16, 16))
    images = images_of(16)
    pixels = as_pixels(images).requires_grad_()
    values = pixel_map(pixels)
    assert pixel_map.inverse.shape[0] == 1, "padding must not count as a copy of a pixel"
    assert (values - call(images)["pixel_values"]).abs().max() <= 1e-5
    (gradient,) = torch.autograd.grad(values.sum(), pixels)
    assert (gradient[..., :2] == 0).all() and (gradient[..., 2:] > 0).all()
    swapped = [1 / std for std in reversed(processor.image_std)]
    assert torch.allclose(gradient[0, :, 0, 5], torch.tensor(swapped), rtol=1e-4)


def test_wrong_resolution_is_named(folders):
    _, pixel_map = probe(folders["qwen3_vl"], 64)
    with pytest.raises(ModelError, match=r"3, 64, 64.*\(1, 3, 80, 80\)"):
        pixel_map(torch.zeros(1, 3, 80, 80))


def test_keeps_the_dtype_of_the_pixels(folders):
    _, pixel_map = probe(folders["llava"], 56)
    for dtype in (torch.bfloat16, torch.float64):
        assert pixel_map(torch.rand(1, 3, 56, 56, dtype=dtype)).dtype == dtype


def test_processor_folder_survives_save_and_load(family, folders, tmp_path):
    first = load_processor(folders[family])
    first.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((Path(folders[family]) / "config.json").read_bytes())
    second = load_processor(tmp_path)
    assert type(second).__name__ == type(first).__name__
    assert second.tokenizer.padding_side == "left" and second.chat_template == first.chat_template
    images = images_of(NATIVE[family], 1)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "héllo ✓"}]}
    texts = [p.apply_chat_template([message], add_generation_prompt=True) for p in (first, second)]
    assert texts[0] == texts[1]
    a, b = (p(images=images, text=[texts[0]], return_tensors="pt") for p in (first, second))
    assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("content", [None, "{ not json"])
def test_unloadable_processor_is_a_model_error(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
        (tmp_path / "processor_config.json").write_text(content)
    with pytest.raises(ModelError, match="cannot load the processor of"):
        load_processor(tmp_path)
