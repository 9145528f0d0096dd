"""Cards: what is known of an entry without loading it, and what is said when its weights are not here."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from safemed_bench.core.errors import ModelError, UsageError
from safemed_bench.datasets.phantom import WORDS
from safemed_bench.models.card import card_from_folder, locate, resolve
from safemed_bench.models.tiny import build, save


def spec(**values):
    fields = ("path", "revision", "prompt", "decode", "max_new_tokens", "dtype", "adapter")
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
