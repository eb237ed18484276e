"""The small trained checkpoints that the project ships: where they are on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from mm_core.errors import ConfigError

DEFAULT_MODEL = "qwen2vl-nano"
ZOO_VARIABLE = "MM_ZOO"


def default_model() -> Path:
    """Directory of the model that `mm run` takes where none is named."""
    return find_model(DEFAULT_MODEL)


def find_model(name: str) -> Path:
    """Directory of a zoo model: in $MM_ZOO, or in the `zoo/` above this file or the working directory.

    Raises ConfigError where it is in none of them.
    """
    for folder in _zoo_folders():
        if (folder / name / "config.json").is_file():
            return folder / name
    raise ConfigError(
        f"No model was named, and the small model '{name}' is not on this machine: it lies in the directory zoo/ "
        f"of the mm-core repository. Name a model (a directory or hub id), or set {ZOO_VARIABLE} to that directory."
    )


def _zoo_folders() -> list[Path]:
    if given := os.environ.get(ZOO_VARIABLE):
        return [Path(given).expanduser()]
    here = Path(__file__).resolve()
    return [parent / "zoo" for start in (here, Path.cwd().resolve() / "_") for parent in start.parents]
