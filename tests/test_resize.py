"""Resampling inside an image processor is replayed to the level, has the gradient of its matrix, or is refused."""

from __future__ import annotations

import threading

import numpy as np
import PIL.Image
import pytest
import torch

from safemed_bench.core.errors import ModelError
from safemed_bench.models.pixels import PixelMap
from safemed_bench.models.resize import Resize, Tape

FILTERS = list(PIL.Image.Resampling)
SIZES = [((112, 112), (56, 56)), ((60, 90), (128, 64)), ((64, 64), (96, 64)), ((33, 64), (64, 33))]


def whole(inside, outside, kind):
    """A resize of a canvas that is the whole buffer; sizes are (height, width)."""
    count = 3 * inside[0] * inside[1]
    zeros = np.zeros(count, np.int64)
    return Resize.of(inside, (outside[::-1], int(kind)), np.arange(count), zeros == 0, zeros)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def flat(image, dtype=torch.float32):
    return torch.from_numpy(image.transpose(2, 0, 1).reshape(1, -1).copy()).to(dtype) / 255


@pytest.mark.parametrize("kind", FILTERS, ids=lambda k: k.name)
@pytest.mark.parametrize(("inside", "outside"), SIZES)
def test_equals_pillow_to_the_level(inside, outside, kind):
    image = noise(*inside)
    image[:9, :9] = 255 * (np.indices((9, 9)).sum(0) % 2)[..., None]  # edges, where lobes of the filter clip
    real = np.asarray(PIL.Image.fromarray(image).resize(outside[::-1], kind))
    ours = whole(inside, outside, kind)(flat(image)) * 255
    assert torch.equal(ours.round().int(), (flat(real) * 255).round().int())
    assert (ours - ours.round()).abs().max() < 1e-3


def test_gradient_is_straight_through_the_rounding_and_stops_at_the_clip():
    resize = whole((24, 24), (12, 12), PIL.Image.Resampling.LANCZOS)
    pixels = (torch.rand(1, 3 * 24 * 24, dtype=torch.float64) * 0.2 + 0.4).requires_grad_()
    weight = torch.randn(1, 3 * 12 * 12, dtype=torch.float64)
    (ours,) = torch.autograd.grad((resize(pixels) * weight).sum(), pixels)
    exact = torch.einsum("ai,cab,bj->cij", resize.down, weight.view(3, 12, 12), resize.across).flatten()
    assert torch.allclose(ours[0], exact, rtol=1e-9, atol=1e-12)
    narrower = whole((24, 24), (24, 12), PIL.Image.Resampling.LANCZOS)
    white = torch.ones(1, 3 * 24 * 24, dtype=torch.float64)
    white[0, 5] = 0  # the ringing around it would be brighter than white
    white.requires_grad_()
    beyond = (white.detach().view(3, 24, 24) @ narrower.across.T > 1.005).flatten()
    (clipped,) = torch.autograd.grad(narrower(white)[0, beyond].sum(), white)
    assert beyond.any() and not clipped.any()


def processor(*steps):
    """An image processor that shows the canvas and the outcome of `steps`, each of which sees the one before."""

    def call(images):
        rows = []
        for image in images:
            views = [PIL.Image.fromarray(image)]
            for step in steps:
                views.append(step(views[-1]))
            rows.append(np.concatenate([np.asarray(view).transpose(2, 0, 1).ravel() for view in views]))
        return {"pixel_values": torch.from_numpy(np.stack(rows)).float() / 127.5 - 1}

    return call


def padded(image):
    out = PIL.Image.new("RGB", (image.width + 6, image.height + 2), (9, 80, 200))
    out.paste(image, (4, 1))
    return out


@pytest.mark.parametrize(
    "steps",
    [
        (lambda i: i.resize((8, 8), 3), lambda i: i.resize((20, 12), 1)),
        (lambda i: i.crop((3, 2, 13, 11)), lambda i: i.resize((7, 5), 2)),
        (padded, lambda i: i.resize((9, 9), 3), padded),
        (lambda i: i.resize((16, 16), 3), lambda i: i.resize((24, 16)), lambda i: i.resize((5, 4), 0)),
    ],
    ids=["chain", "crop", "padding", "same size, one axis, nearest"],
)
def test_map_follows_views_of_views(steps):
    call = processor(*steps)
    found = PixelMap.probe(call, (16, 16))
    images = [noise(16, 16, seed) for seed in (4, 5)]
    pixels = torch.cat([flat(image) for image in images]).view(2, 3, 16, 16)
    assert found.resizes and (found(pixels) - call(images)["pixel_values"]).abs().max() <= 1e-5


def test_map_between_the_levels_is_that_of_the_rounded_image():
    """What the deployed path sees of an image that is not on the 8-bit grid."""
    call = processor(lambda i: i.resize((8, 8), 3))
    found = PixelMap.probe(call, (16, 16))
    pixels = torch.rand(1, 3, 16, 16)
    levels = (pixels * 255).round() / 255
    assert torch.equal(found(pixels)[..., -192:], found(levels)[..., -192:])
    assert not torch.equal(found.smooth()(pixels)[..., -192:], found.smooth()(levels)[..., -192:])


def test_refuses_what_it_does_not_reproduce():
    with pytest.raises(ModelError, match="not reproduced"):
        PixelMap.probe(processor(lambda i: i.resize((8, 8), 3, (1.5, 0, 9, 9))), (16, 16))
    with pytest.raises(ModelError, match="not reproduced"):
        PixelMap.probe(processor(lambda i: i.resize((8, 8), 3, reducing_gap=2.0)), (16, 16))
    with pytest.raises(ModelError, match="depends on the content"):
        PixelMap.probe(processor(lambda i: i.resize((8, 8) if i.getpixel((0, 0))[0] < 99 else (4, 4))), (16, 16))
    with pytest.raises(ModelError, match=r"resizes all of it. It takes 8x8 as it is: set the resolution to 8"):
        PixelMap.probe(lambda images: processor()([np.asarray(PIL.Image.fromarray(i).resize((8, 8))) for i in images]),
                       (16, 16))  # fmt: skip


def test_pillow_is_itself_again_and_other_threads_never_notice():
    own, image = PIL.Image.Image.resize, PIL.Image.fromarray(noise(16, 16))
    plain, elsewhere = np.asarray(image.resize((8, 8), 3)), []

    def call(images):
        thread = threading.Thread(target=lambda: elsewhere.append(np.asarray(image.resize((8, 8), 3))))
        thread.start()
        thread.join()
        return processor(lambda i: i.resize((8, 8)))(images)

    tape = Tape.record(call, (16, 16))
    assert tape.asked == (((8, 8), 3),) and tape.size == 3 * (256 + 64)
    assert PIL.Image.Image.resize is own and np.array_equal(elsewhere[0], plain)
    with pytest.raises(ZeroDivisionError):
        Tape.record(lambda images: 1 / 0, (16, 16))
    assert PIL.Image.Image.resize is own
