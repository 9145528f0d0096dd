"""Kernels and the host's threads: the same numbers as the plain way, and left alone where that would not be so."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import QWEN, build
from measured_family import load, questions
from PIL import Image
from transformers.masking_utils import flash_attention_mask

from safemed_bench.models import attention
from safemed_bench.models.patches import use_linear_patches
from safemed_bench.run.reading import read_canvases


@pytest.mark.parametrize("lengths", [(6, 6, 6), (4, 2, 4, 2, 1, 4, 2, 4, 2, 1), (3, 5)])
def test_packed_attention_is_that_of_each_sequence_alone(lengths):
    """Values and gradients, for images of one size and for windows of several."""
    draw = torch.Generator().manual_seed(0)
    packed = [torch.randn(1, 2, sum(lengths), 8, generator=draw).requires_grad_() for _ in range(3)]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    out, _ = attention.packed_sdpa(
        torch.nn.Module(), *packed, None, cu_seq_lens_q=bounds, max_length_q=max(lengths), scaling=0.3
    )
    parts = zip(*(x.split(lengths, dim=2) for x in packed), strict=True)
    alone = [torch.nn.functional.scaled_dot_product_attention(*qkv, scale=0.3) for qkv in parts]
    expected = torch.cat(alone, 2).transpose(1, 2)
    assert torch.allclose(out, expected, atol=1e-6)
    weights = torch.randn(out.shape, generator=draw)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), packed) for x in (out, expected))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


class Patches(torch.nn.Module):
    """A patch embedding as Qwen's, with something else after the convolution or with nothing."""

    def __init__(self, after):
        super().__init__()
        self.proj, self.after = torch.nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4)), after

    def forward(self, patches):
        return self.after(self.proj(patches.view(-1, 3, 2, 4, 4)).view(-1, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patch_embeddings_that_are_more_than_a_product_are_left_alone(dtype):
    shapes = [torch.nn.Identity(), torch.nn.LayerNorm(8), torch.nn.Unflatten(1, (2, 4)), torch.nn.ReLU()]
    modules = [Patches(after).to(dtype) for after in shapes]
    patches = torch.randn(5, 96).to(dtype)
    with torch.no_grad():
        before = [module(patches) for module in modules]
        for module in modules:
            use_linear_patches(module)
        after = [module(patches) for module in modules]
    assert ["forward" in vars(module) for module in modules] == [True, False, False, False]
    close = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert all(torch.allclose(a, b, atol=close) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("family", [*QWEN, "llava"])
def test_qwen_s_towers_take_their_patches_as_a_product(family, tmp_path):
    modules = load(family, build(family, tmp_path)).model.named_modules()
    embeddings = [module for name, module in modules if name.endswith("patch_embed")]
    assert any("forward" in vars(module) for module in embeddings) == (family in QWEN)


@pytest.mark.parametrize("installed", [True, False])
def test_flash_attention_is_for_half_precision_on_a_gpu(monkeypatch, installed):
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: installed)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    best = "flash_attention_2" if installed else "sdpa"
    assert [attention.preferred_attention(gpu, dtype) for dtype in attention.HALF] == [best, best]
    assert attention.preferred_attention(gpu, torch.float32) == "sdpa"
    assert attention.preferred_attention(cpu, torch.bfloat16) == "sdpa"


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "paligemma2"])
def test_flash_attention_is_not_for_prompts_that_are_seen_in_both_directions(monkeypatch, family, tmp_path):
    """transformers makes no mask for it that says so: the model would be another one."""
    asked, plain = [], load(family, build(family, tmp_path))
    model = copy.copy(plain.model)
    monkeypatch.setattr(attention, "preferred_attention", lambda device, dtype: "flash_attention_2")
    model.set_attn_implementation = asked.append
    attention.use_preferred_attention(model, plain.device, both_ways=plain.chat.both_ways)
    assert plain.chat.both_ways == (family != "qwen3_vl") == (not asked)
    mask = {"attention_mask": torch.ones(1, 4, dtype=torch.bool), "mask_function": lambda *where: True}
    assert flash_attention_mask(1, 4, 4, **mask) is None, "it heeds such masks now: the rule can go"


def test_images_read_by_threads_are_the_same(tmp_path):
    """Order, pixels and what is said of the files that cannot be read."""
    draw, asked = np.random.default_rng(0), []
    for i in range(12):
        path = tmp_path / f"{i}.png"
        Image.fromarray(draw.integers(0, 256, (40, 30 + i, 3), dtype=np.uint8)).save(path)
        asked.append(replace(questions()[0], id=str(i), image=str(path)))
    (tmp_path / "3.png").write_bytes(b"no image")
    (tmp_path / "7.png").unlink()
    found, problems = read_canvases(asked, 32, "pad", readers=8)
    alone, said = read_canvases(asked, 32, "pad")
    assert list(found) == list(alone) and problems == said and sorted(said) == [3, 7]
    assert all(np.array_equal(found[i], alone[i]) for i in found)
