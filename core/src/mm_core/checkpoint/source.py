"""Where a checkpoint's files are: a directory, or a hub repository brought into the local cache.

Only settings, tokenizer files and safetensors are ever downloaded: pickled weights and Python
files of a repository never reach the disk.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_core.errors import CheckpointError

ALLOW_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*merges*")
IGNORE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.py", "*.h5", "*.msgpack", "*.onnx*", "*.gguf")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A checkpoint's directory; `revision` is the hub's commit, or "" for a plain directory."""

    name: str
    path: Path
    revision: str = ""


def locate(name: str, *, revision: str | None = None, show_progress: bool = True) -> Source:
    """Find a checkpoint: a directory as it is, anything else as a hub id.

    Raises CheckpointError when it is not found, not readable, or not something mm-core loads.
    """
    if not name or "\0" in name:
        raise CheckpointError(f"{name!r} names no checkpoint. Give a directory or a hub id such as 'org/model'.")
    directory = Path(name).expanduser()
    if directory.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"revision={revision!r} was given with the directory '{name}'. Revisions belong to hub ids: "
                "leave it out, or give the hub id instead of the directory."
            )
        source = Source(name, directory.resolve())
    elif directory.exists():
        raise CheckpointError(f"'{name}' is a file. Give the directory that holds config.json and the weights.")
    elif _looks_like_path(name):
        raise CheckpointError(
            f"Checkpoint directory '{name}' does not exist. Check the path, or give a hub id such as 'org/model'."
        )
    else:
        source = _download(name, revision, show_progress)
    _check(source)
    return source


def sub_checkpoints(path: Path, config: Mapping[str, Any]) -> dict[str, Path]:
    """Folders of a checkpoint that is kept in parts, each with a config.json of its own: {part: folder}.

    The checkpoint's config.json has `<part>_cfg` for each: a path, of which the last folder counts (the rest
    is where its author had it), or settings, the folder being called `<part>` then. None where the weights
    lie beside config.json.
    """
    if any(path.glob("*.safetensors")):
        return {}
    folders = {entry.name: entry for entry in path.iterdir() if (entry / "config.json").is_file()}
    parts: dict[str, Path] = {}
    for key, value in config.items():
        part = key.removesuffix("_cfg")
        named = Path(value).name if isinstance(value, str) else ""
        folder = folders.get(named) or folders.get(part)
        if part != key and folder is not None:
            parts[part] = folder
    return parts


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~", "\\")) or not _HUB_ID.fullmatch(name)


def _check(source: Source) -> None:
    if not (source.path / "config.json").is_file():
        raise CheckpointError(
            f"'{source.name}' has no config.json, so it is not a checkpoint in the transformers layout. "
            "Give the directory (or repository) that holds config.json beside the *.safetensors files."
        )
    files = [entry.name for entry in source.path.iterdir() if entry.is_file()]
    if any(source.path.glob("*.safetensors")) or any(source.path.glob("*/*.safetensors")):
        return
    pickles = sorted(f for f in files if f.endswith(PICKLE_SUFFIXES) and f != "training_args.bin")
    if pickles:
        raise CheckpointError(
            f"'{source.name}' has only pickled weights ({', '.join(pickles[:5])}). mm-core does not load them: "
            "unpickling runs code from the file. Convert them on a machine you trust, with transformers' "
            "`save_pretrained(..., safe_serialization=True)`, or take a revision that has *.safetensors."
        )


def _download(name: str, revision: str | None, show_progress: bool) -> Source:
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(ALLOW_PATTERNS),
            ignore_patterns=list(IGNORE_PATTERNS),
            tqdm_class=None if show_progress else _silent_bar(),
        )
    except Exception as error:
        raise _explain(name, revision, error) from error
    return Source(name, Path(path), Path(path).name)


def _silent_bar() -> Any:
    from tqdm.auto import tqdm

    class SilentBar(tqdm):  # type: ignore[misc]
        """A progress bar that counts and shows nothing."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)  # huggingface_hub's own bars know this argument, plain tqdm does not
            super().__init__(*args, **{**kwargs, "disable": True})

    return SilentBar


def _explain(name: str, revision: str | None, error: Exception) -> CheckpointError:
    """Say what went wrong with a download, and what to do about it."""
    from huggingface_hub import errors as hub

    where = f"'{name}'" + (f" at revision {revision!r}" if revision else "")
    if isinstance(error, hub.GatedRepoError):
        text = "is gated. Accept its terms on its hub page, then log in with `hf auth login` (or set HF_TOKEN)."
    elif isinstance(error, hub.RevisionNotFoundError):
        text = "has no such revision. Check the branch, tag or commit."
    elif isinstance(error, hub.RepositoryNotFoundError) or _status(error) == 401:
        text = (
            "was not found on the hub, and there is no such directory. Check the spelling; for a private "
            "repository log in with `hf auth login` (or set HF_TOKEN)."
        )
    elif isinstance(error, hub.LocalEntryNotFoundError | hub.OfflineModeIsEnabled):
        text = (
            "is not (completely) in the local cache and the hub cannot be reached. Check the network and "
            "HF_HUB_OFFLINE, or give the directory of a local copy."
        )
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text = "does not fit on the disk. Free some space, or point HF_HOME to a larger disk."
    elif isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        text = "cannot be written to the cache (no permission). Point HF_HOME to a directory you may write."
    else:
        text = (
            f"could not be downloaded ({type(error).__name__}: {_first_line(error)}). Try again: files that are "
            "complete are not fetched twice. Or give the directory of a local copy."
        )
    return CheckpointError(f"Checkpoint {where} {text}")


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no details"
