"""LoRA adapters by path on several families, and quantised weights: what they change, and what is refused."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from families import build
from measured_family import attacked, load, prepared
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from safemed_bench.core.errors import ModelError
from safemed_bench.models import loading
from safemed_bench.models.card import card_from_folder

FAMILIES = ("qwen3_vl", "llava_next", "paligemma2")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    pytest.importorskip("peft", reason="LoRA adapters need peft")
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return build(family, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def adapter(family, folder, tmp_path_factory):
    """A random adapter of all linear layers, saved the way a LoRA training saves one."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    path = tmp_path_factory.mktemp(f"{family}-lora")
    get_peft_model(AutoModelForImageTextToText.from_pretrained(folder), config).save_pretrained(path)
    return path


def test_an_adapter_changes_scores_gradient_and_fingerprint(family, folder, adapter):
    """Loading runs the whole start-up check, hence the adapted gradient is a finite difference of adapted scores."""
    plain, adapted = load(family, folder), load(family, folder, adapter=str(adapter))
    seen = []
    for model in (plain, adapted):
        batch = prepared(model)
        pixels = batch.pixels.requires_grad_()
        scores = model.option_logits(batch, pixels)[:, :2]
        seen.append((scores.detach(), torch.autograd.grad(scores[:, 0].sum(), pixels)[0].flatten()))
    assert (seen[0][0] - seen[1][0]).abs().min() > 1e-3
    assert torch.cosine_similarity(seen[0][1], seen[1][1], dim=0) < 0.9
    assert plain.fingerprint != adapted.fingerprint and not any(p.requires_grad for p in adapted.model.parameters())


def test_an_adapted_model_is_the_merged_one(family, folder, adapter, tmp_path):
    from peft import PeftModel

    merged = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder), adapter)
    build(family, tmp_path)
    merged.merge_and_unload().save_pretrained(tmp_path)
    adapted, whole = load(family, folder, adapter=str(adapter)), load(family, tmp_path)
    batch = prepared(adapted)
    with torch.no_grad():
        ours, theirs = (m.option_logits(batch, batch.pixels)[:, :2] for m in (adapted, whole))
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_an_adapted_model_is_attacked_and_writes(family, folder, adapter):
    model = load(family, folder, adapter=str(adapter))
    _, result = attacked(model)
    assert result.attacked.all() and (result.dead_gradients == 0).all() and result.success.any()
    reasoning = load(family, folder, adapter=str(adapter), prompt="think", decode="generate")
    batch = prepared(reasoning)
    assert all(len(answer.tokens) > 0 for answer in reasoning.answer(batch, batch.pixels))


def test_an_adapter_of_another_model_is_refused(family, folder, adapter, tmp_path):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(adapter / "adapter_model.safetensors")
    foreign = {key.replace("layers.0", "layers.9"): value for key, value in weights.items()}
    save_file(foreign, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="does not fit the model"):
        load(family, folder, adapter=str(tmp_path))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_weights_are_refused_on_a_cpu_with_the_reason(kind, tmp_path):
    with pytest.raises(ModelError, match=f"quantize: {kind} needs a CUDA GPU.*leave `quantize` out"):
        load("llava", build("llava", tmp_path), quantize=kind)


def test_quantised_weights_want_bitsandbytes(monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs the extra: pip install 'safemed-bench\[quantize\]'"):
        loading._quantised("nf4", torch.device("cuda"), torch.bfloat16)


def test_quantised_weights_are_another_fingerprint(tmp_path):
    from types import SimpleNamespace

    folder = build("llava", tmp_path)
    prints = {
        card_from_folder("m", folder, SimpleNamespace(quantize=kind)).fingerprint for kind in (None, "int8", "nf4")
    }
    assert len(prints) == 3 and card_from_folder("m", folder).fingerprint in prints


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None,
    reason="int8 and nf4 weights need a CUDA GPU and bitsandbytes",
)
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_weights_are_attacked(kind, tmp_path):
    folder = build("qwen3_vl", tmp_path)
    model = load("qwen3_vl", folder, quantize=kind, device="cuda")
    _, result = attacked(model)
    assert result.attacked.all() and (result.dead_gradients == 0).all()
