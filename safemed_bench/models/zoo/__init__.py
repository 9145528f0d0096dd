"""The default entries, shipped as folders of safetensors; each is registered under its folder's name."""

from __future__ import annotations

from pathlib import Path

from ...core import registry
from ..card import ENTRY_FILE

HERE = Path(__file__).parent

for _folder in sorted(HERE.iterdir()):
    if (_folder / ENTRY_FILE).is_file():
        registry.models.register(_folder.name)(_folder)
