"""Cards: what is known of an entry without loading it, and what is said when its weights are not here."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from safemed_bench.core import registry
from safemed_bench.core.errors import ModelError, UsageError
from safemed_bench.datasets.phantom import WORDS
from safemed_bench.models import load_model
from safemed_bench.models.card import builder_settings, card_from_folder, locate, resolve
from safemed_bench.models.tiny import build, save


def spec(**values):
    fields = ("path", "revision", "prompt", "decode", "max_new_tokens", "dtype", "adapter", "quantize")
    return SimpleNamespace(**{name: None for name in fields} | {"name": "m"} | values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("entry")
    save(*build(WORDS, hidden=32, layers=1, vision_hidden=32, vision_layers=2), path)
    (path / "entry.json").write_text(json.dumps({"prompt": "think_brief", "max_new_tokens": 40}))
    return path


def test_the_entrys_own_reading_and_the_suites_over_it(folder):
    own = resolve(spec(path=str(folder)))
    assert (own.prompt, own.decode, own.reasons, own.max_new_tokens) == ("think_brief", "generate", True, 40)
    other = resolve(spec(path=str(folder), prompt="bare"))
    assert (other.prompt, other.decode, other.reasons) == ("bare", "logprob", False)
    assert own.fingerprint != other.fingerprint


def test_the_fingerprint_follows_the_weights(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    same = card_from_folder("other-name", copy)
    assert same.fingerprint == card_from_folder("m", folder).fingerprint
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert card_from_folder("m", copy).fingerprint != same.fingerprint


def test_absent_weights_say_where_they_were_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"not in the local Hugging Face cache.*hf download owner/absent"):
        locate("owner/absent")
    with pytest.raises(ModelError, match="model folder not found"):
        locate(str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        locate(str(tmp_path))
    (tmp_path / "config.json").touch()
    (tmp_path / "training_args.bin").touch()
    with pytest.raises(ModelError, match="has no weights"):
        locate(str(tmp_path))
    (tmp_path / "pytorch_model.bin").touch()
    assert locate(str(tmp_path)) == tmp_path


def test_a_broken_entry_file_is_named_with_its_line(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "entry.json").write_text('{"prompt": "think",\n "decode" "generate"}')
    with pytest.raises(ModelError, match=r"entry\.json:2:\d+  not JSON"):
        card_from_folder("m", copy)


def test_unknown_names_say_what_was_meant(folder):
    with pytest.raises(UsageError, match=r"unknown prompt 'thnk'\. Did you mean 'think'"):
        resolve(spec(path=str(folder), prompt="thnk"))
    with pytest.raises(UsageError, match="unknown model 'no-such-entry'"):
        resolve(spec(name="no-such-entry"))


def test_cards_need_no_torch(folder):
    code = (
        "import sys; from pathlib import Path; from safemed_bench.models.card import card_from_folder;"
        f"card_from_folder('m', Path({str(folder)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "pytorch_model.bin.index.json", "chat_template.jinja"]
)
def test_the_fingerprint_sees_weights_of_every_form(folder, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    found = {card_from_folder("m", copy).fingerprint}
    for content in ("1", "2"):
        (copy / name).write_text(content)
        found.add(card_from_folder("m", copy).fingerprint)
    assert len(found) == 3


def test_an_absent_adapter_is_named(folder):
    with pytest.raises(ModelError, match="adapter folder not found: /no/where"):
        resolve(spec(path=str(folder), adapter="/no/where"))


# -- plugins that build their model themselves


def plugin(folder, name, body, file="plugin.py"):
    folder.mkdir(exist_ok=True)
    path = folder / file
    path.write_text(f"from safemed_bench.core.registry import models\n\n@models.register({name!r})\n{body}\n")
    registry.load_plugin_file(path)
    return path


def test_settings_reach_a_builder_that_takes_them_and_are_refused_by_one_that_does_not(tmp_path):
    plugin(tmp_path, "plain", "def plain(resolution, device): return 'built'")
    plugin(tmp_path / "b", "open", "def build(resolution, device, dtype='own', prompt=None): return dtype, prompt")
    assert load_model(spec(name="plain"), 16, device="cpu") == "built"
    for setting in ({"prompt": "think"}, {"decode": "generate"}, {"max_new_tokens": 9}, {"revision": "x"}):
        with pytest.raises(UsageError, match=rf"models\.plain\.{next(iter(setting))}: .* would have no effect"):
            resolve(spec(name="plain", **setting))
        with pytest.raises(UsageError):
            load_model(spec(name="plain", **setting), 16, device="cpu")
    assert load_model(spec(name="open", prompt="think"), 16, device="cpu", dtype="fp32") == ("fp32", "think")
    assert load_model(spec(name="open", dtype="fp16"), 16, device="cpu", dtype="fp32") == ("fp16", None)
    with pytest.raises(UsageError, match=r"models\.open\.adapter"):
        resolve(spec(name="open", adapter="/x"))
    taken = builder_settings(lambda resolution, device, **more: None, spec(adapter="/x", dtype="auto"))
    assert taken == {"adapter": "/x"}


def test_a_plugins_fingerprint_follows_its_code(tmp_path):
    path = plugin(tmp_path, "coded", "def coded(resolution, device): return 1")
    before = resolve(spec(name="coded")).fingerprint
    assert resolve(spec(name="coded")).fingerprint == before
    path.write_text(path.read_text().replace("return 1", "return 2"))
    assert resolve(spec(name="coded")).fingerprint != before


def test_two_plugin_files_of_one_name_are_two_plugins(tmp_path):
    plugin(tmp_path / "a", "of_a", "def a(resolution, device): return 'a'")
    plugin(tmp_path / "b", "of_b", "def b(resolution, device): return 'b'")
    assert [load_model(spec(name=name), 16, device="cpu") for name in ("of_a", "of_b")] == ["a", "b"]


def test_the_source_of_a_plugin_package_is_all_of_it_and_ours_is_none(tmp_path, monkeypatch):
    package = tmp_path / "some_plugin_package"
    package.mkdir()
    (package / "__init__.py").write_text("def build(resolution, device): return 1\n")
    (package / "helper.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry.models.lazy("packaged", "some_plugin_package:build")
    before = registry.models.source("packaged")
    (package / "helper.py").write_text("x = 2\n")
    assert before and registry.models.source("packaged") != before
    assert registry.attacks.source("pgd") == registry.objectives.source("answer") == ""
