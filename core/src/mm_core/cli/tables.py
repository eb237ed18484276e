"""`mm plugins` and `mm env`: what is installed here."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from mm_core import __version__
from mm_core.plugins import PluginInfo, PluginRegistry

_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "av", "pluggy")


def plugins(arguments: argparse.Namespace) -> int:
    """Print one row a plugin, and the errors of those that are not used."""
    infos = PluginRegistry().describe()
    if arguments.json:
        print(json.dumps([_row(info) for info in infos], indent=2))
        return 0
    if not infos:
        print("No plugins are installed. Install one, for example: pip install mm-plugin-qwen2vl")
        return 0
    print(_table(["plugin", "version", "modalities", "architectures", "hooks"], [_cells(info) for info in infos]))
    for info in infos:
        if info.error is not None:
            print(f"\n{info.label} is not used: {info.error}")
    return 0


def _row(info: PluginInfo) -> dict[str, object]:
    row = dataclasses.asdict(info)
    del row["given"]  # always false here: nothing was handed over
    return row


def _cells(info: PluginInfo) -> list[str]:
    if info.error is not None:
        return [info.name, info.version or "-", "-", "failed to load", "-"]
    hooks = ", ".join(hook.removeprefix("mm_") for hook in info.hooks)
    return [info.name, info.version or "-", ", ".join(info.modalities), ", ".join(info.architectures), hooks]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(cell.ljust(widths[i]) for i, cell in enumerate(row)).rstrip() for row in lines)


def environment(arguments: argparse.Namespace) -> int:
    """Print versions of Python, of the packages that matter, and the GPUs."""
    facts = {"mm-core": __version__, "python": platform.python_version(), "platform": platform.platform()}
    facts |= {name: _version(name) for name in _PACKAGES}
    facts["gpu"] = _gpus()
    facts["plugins"] = ", ".join(info.label for info in PluginRegistry().describe()) or "none"
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        width = max(map(len, facts))
        print("\n".join(f"{name.ljust(width)}  {value}" for name, value in facts.items()))
    return 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    try:
        import torch
    except Exception as error:  # a broken torch is what `mm env` must be able to show
        print(f"torch cannot be imported: {type(error).__name__}: {error}", file=sys.stderr)
        return "unknown"
    if not torch.cuda.is_available():
        return "none"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"
