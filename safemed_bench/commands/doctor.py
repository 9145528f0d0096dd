"""doctor: what this machine has, and what of it would keep a run from working."""

from __future__ import annotations

import os
import platform
import re
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from . import output as out

ROOM = 2.0
"""GB of free disk below which doctor warns: a full run's artefacts and tables are smaller."""


def doctor(*, as_json: bool) -> None:
    """Print the report; never fails, whatever it finds."""
    report = examine()
    if as_json:
        out.print_json(report)
        return
    console = out.results()
    rows = [[name, p["installed"] or "missing", p["wanted"], p["state"]] for name, p in report["packages"].items()]
    out.print_table(console, "packages", ("package", "installed", "wanted", "state"), rows)
    for key, value in report["machine"].items():
        console.print(f"{key}: {value}", markup=False, soft_wrap=True)
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)
    if not report["warnings"]:
        console.print("nothing stands in the way of a run")


def examine() -> dict[str, Any]:
    """Packages against what pyproject asks for, the machine, and warnings in words."""
    packages = _packages()
    machine, warnings = _machine()
    for name, package in packages.items():
        if package["state"] != "ok":
            wanted = package["wanted"] or "any version"
            warnings.append(f"{name} is {package['installed'] or 'missing'}, wanted is {wanted}")
    return {"packages": packages, "machine": machine, "warnings": warnings}


def _packages() -> dict[str, dict[str, str]]:
    found = {}
    for line in _requirements():
        match = re.match(r"([A-Za-z0-9_.-]+)\s*(?:>=\s*([\d.]+))?", line)
        if match is None or "extra ==" in line:
            continue
        name, least = match[1], match[2] or ""
        try:
            have = version(name)
        except PackageNotFoundError:
            have = ""
        state = "missing" if not have else "old" if least and _numbers(have) < _numbers(least) else "ok"
        found[name] = {"installed": have, "wanted": f">={least}" if least else "", "state": state}
    return found


def _requirements() -> list[str]:
    try:
        return requires("safemed-bench") or []
    except PackageNotFoundError:
        return []


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0]))


def _machine() -> tuple[dict[str, Any], list[str]]:
    from ..core import registry
    from ..datasets.base import cache_folder
    from ..run.devices import usable_cores

    warnings: list[str] = []
    cache, root = cache_folder(), os.environ.get("SAFEMED_OMNIMEDVQA", "")
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    if free < ROOM:
        warnings.append(f"only {free:.1f} GB are free in {Path.cwd()}")
    if root and not Path(root).expanduser().is_dir():
        warnings.append(f"SAFEMED_OMNIMEDVQA names no folder: {root}")
    entries = list(registry.models)
    if not entries:
        warnings.append("no model entries are registered; the default entries are not in this installation")
    machine = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **_torch(warnings),
        "cores": usable_cores(),
        "entries": ", ".join(entries) or "none",
        "data": root or "phantom (SAFEMED_OMNIMEDVQA is not set)",
        "cache": f"{cache}{'' if cache.is_dir() else ' (not there yet)'}",
        "hub offline": os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"),
        "free disk": f"{free:.1f} GB",
    }
    return machine, warnings


def _torch(warnings: list[str]) -> dict[str, Any]:
    try:
        import torch
    except Exception as error:  # a broken installation is what doctor is there to tell
        warnings.append(f"torch cannot be imported: {type(error).__name__}: {error}")
        return {"device": "none"}
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(i) for i in range(gpus)]
    return {"device": ", ".join(names) or "cpu", "cuda": torch.version.cuda, "threads": torch.get_num_threads()}
