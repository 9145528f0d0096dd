"""What only a GPU can show; skipped without one, and CI has none."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, build, lacks
from measured_family import load, prepared
from test_shortcut_pass import assert_same
from test_shortcuts import options, token_loss

from safemed_bench.models.generation import cache_options
from safemed_bench.models.recompute import recompute
from safemed_bench.models.transfer import upload
from safemed_bench.run.batching import BatchSizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_scores_and_replies_of_the_cpu(family, tmp_path):
    if reason := lacks(family):
        pytest.skip(reason)
    folder, found = build(family, tmp_path), []
    for device in ("cpu", "cuda"):
        vlm = load(family, folder, device=device, dtype="fp32", prompt="think", decode="generate")
        batch = prepared(vlm)
        with torch.no_grad():
            found.append((options(vlm, batch, batch.pixels).cpu(), vlm.answer(batch, batch.pixels)))
    assert bool(cache_options(vlm)) == getattr(vlm.model, "_can_compile_fullgraph", False), "a static cache"
    assert (found[0][0] - found[1][0]).abs().max() <= 1e-3
    assert [a.tokens for a in found[0][1]] == [a.tokens for a in found[1][1]]


def test_the_probe_meets_the_real_end_of_memory():
    free, _ = torch.cuda.mem_get_info()
    each, done = free // 10, []

    def work(rows):
        torch.empty(each * len(rows), dtype=torch.uint8, device="cuda")
        done.extend(rows)

    BatchSizer(None, torch.cuda.empty_cache, probe=8).map("fill", range(40), work)
    assert done == list(range(40))


def test_uploads_wait_for_nobody_and_arrive():
    here = torch.arange(1 << 22)
    assert torch.equal(upload(here, "cuda").cpu(), here)


def test_computing_twice_lowers_the_peak(tmp_path):
    vlm, peaks = load("qwen3_vl", build("qwen3_vl", tmp_path), device="cuda", dtype="fp32"), []
    batch = prepared(vlm)
    for on in (False, True):
        recompute(vlm.model, on=on)
        torch.cuda.reset_peak_memory_stats()
        pixels = batch.pixels.requires_grad_()
        torch.autograd.grad(token_loss(vlm, batch, pixels).sum(), pixels)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0]


def test_an_attack_s_steps_take_the_shortcut(tmp_path, monkeypatch):
    vlm = load("qwen3_vl", build("qwen3_vl", tmp_path), device="cuda", dtype="fp32")
    assert vlm.shortcut.exact, vlm.shortcut.reason
    assert_same(vlm, prepared(vlm), token_loss, monkeypatch, close=1e-3)
