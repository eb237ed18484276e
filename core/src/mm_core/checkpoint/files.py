"""Safetensors files of a checkpoint: which there are, what they hold, whether they are whole.

The layout (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a
JSON header {tensor name: {dtype, shape, data_offsets}}, then the data.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mm_core.checkpoint.json_files import read_json_object
from mm_core.errors import CheckpointError

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_SHOWN = 20


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its file's header tells it. `dtype` in the format's spelling ("F32", "BF16");
    its data are `nbytes` bytes from byte `offset` of the file on. prefix: what `name` has before the
    tensor's name in the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    prefix: str = ""

    @property
    def itemsize(self) -> int:
        """Bytes of one value; KeyError for a dtype that is not in ITEM_BYTES."""
        return ITEM_BYTES[self.dtype]

    @property
    def stored_name(self) -> str:
        """The tensor's name in its file."""
        return self.name.removeprefix(self.prefix)


def listed(names: list[str]) -> str:
    """The first 20 names, and how many more there are."""
    more = f" … and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def read_header(file: Path) -> tuple[bytes, int]:
    """A file's raw JSON header, and the size of the data after it; CheckpointError if damaged."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise damaged(file, f"its header claims {length} bytes, the file has {size}")
            return stream.read(length), size - 8 - length
    except OSError as error:
        raise CheckpointError(f"'{file}' cannot be read ({error.strerror}). Check its permissions.") from error


def damaged(file: Path, why: str) -> CheckpointError:
    """The error for a weight file that is truncated or corrupt."""
    return CheckpointError(f"'{file}' is damaged: {why}. The download may be incomplete: fetch the file again.")


def sample_file(file: Path) -> bytes:
    """Digest of a weight file's header, its size and evenly spaced samples of its data.

    The samples tell fine-tunes of one model apart without reading gigabytes.
    """
    header, data = read_header(file)
    digest = hashlib.sha256(header)
    digest.update(struct.pack("<Q", data))
    with file.open("rb") as stream:
        for i in range(_SAMPLES):
            stream.seek(8 + len(header) + max(0, data - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.digest()


def scan(file: Path) -> Iterator[TensorInfo]:
    """The tensors of one file, by its header; the data must be there in full, without gaps."""
    raw, data = read_header(file)
    try:
        header = json.loads(raw)
        entries = [(name, _entry(value)) for name, value in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged(file, f"its header cannot be parsed ({error})") from error
    end = 0
    for name, (_, _, begin, stop) in sorted(entries, key=lambda entry: entry[1][2:]):
        if begin != end or stop < begin:
            raise damaged(file, f"the offsets of tensor '{name}' overlap or leave a gap")
        end = stop
    if end != data:
        raise damaged(file, f"its tensors take {end} bytes, the file holds {data}")
    for name, (dtype, shape, begin, stop) in entries:
        yield TensorInfo(name, file, dtype, shape, stop - begin, 8 + len(raw) + begin)


def _entry(value: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    begin, stop = value["data_offsets"]
    shape = tuple(int(n) for n in value["shape"])
    return str(value["dtype"]), shape, int(begin), int(stop)


def find_tensors(name: str, path: Path, parts: Mapping[str, Path] | None = None) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint, each from the one file that holds it for good.

    With an index, the file the index names decides; other copies don't count. Absent shards are
    listed in one CheckpointError before anything is loaded. parts: see `source.sub_checkpoints`; the
    tensors of a part are called `<part>.<name>`.
    """
    if parts:
        return _find_in_parts(name, parts)
    index = path / INDEX
    if index.is_file():
        return _find_indexed(name, path, index)
    tensors: dict[str, TensorInfo] = {}
    for file in _unindexed_files(name, path):
        for info in scan(file):
            if info.name in tensors:
                raise CheckpointError(
                    f"'{name}': tensor '{info.name}' is in both {tensors[info.name].file.name} and {file.name}, and "
                    f"there is no {INDEX} to choose. Remove the files that don't belong to the checkpoint."
                )
            tensors[info.name] = info
    return tensors


def _find_in_parts(name: str, parts: Mapping[str, Path]) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for part, folder in parts.items():
        if not any(folder.glob("*.safetensors*")):
            continue  # a part may be without weights; what is missing is named when names are compared
        prefix = f"{part}."
        for tensor, info in find_tensors(f"{name}/{folder.name}", folder).items():
            found[prefix + tensor] = replace(info, name=prefix + tensor, prefix=prefix)
    return found


def _find_indexed(name: str, path: Path, index: Path) -> dict[str, TensorInfo]:
    weight_map = _read_index(index)
    files = sorted(set(weight_map.values()))
    absent = [file for file in files if not (path / file).is_file()]
    if absent:
        raise CheckpointError(
            f"'{name}': {INDEX} names {len(files)} files, {len(absent)} of them absent: {listed(absent)}. "
            "Download the missing files; nothing was loaded."
        )
    found: dict[str, TensorInfo] = {}
    unlisted: list[str] = []
    for file in files:
        for info in scan(path / file):
            if weight_map.get(info.name) == file:
                found[info.name] = info
            elif info.name not in weight_map:
                unlisted.append(f"{info.name} ({file})")
    misplaced = sorted(f"{tensor} ({file})" for tensor, file in weight_map.items() if tensor not in found)
    faults = []
    if misplaced:
        faults.append(f"{len(misplaced)} tensors are not in the file the index names: {listed(misplaced)}")
    if unlisted:
        faults.append(f"{len(unlisted)} tensors are in no index entry: {listed(sorted(unlisted))}")
    if faults:
        raise CheckpointError(
            f"'{name}': {INDEX} does not fit the files: {'; '.join(faults)}. Fetch the index and the files again, "
            "from one revision."
        )
    return found


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"'{index}' has no `weight_map`. Fetch the file again.")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"'{index}' places tensor '{tensor}' in {file!r}; only *.safetensors files beside the index are read."
            )
    return weight_map


def _unindexed_files(name: str, path: Path) -> list[Path]:
    single = path / "model.safetensors"
    if single.is_file():
        return [single]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"'{name}' has no *.safetensors weights. Download them (pickled .bin and .pt weights are not loaded; "
            "convert those on a machine you trust), or run random weights with load_format='dummy'."
        )
    absent = []
    for match in filter(None, (_SHARD.fullmatch(file.name) for file in files)):
        stem, width, total = match[1], len(match[2]), int(match[3])
        if total > 100_000:
            raise damaged(path / match[0], f"its name claims {total} shards")
        names = (f"{stem}-{i:0{width}d}-of-{match[3]}.safetensors" for i in range(1, total + 1))
        absent += [n for n in names if not (path / n).is_file() and n not in absent]
    if absent:
        raise CheckpointError(f"'{name}': {len(absent)} shards are absent: {listed(absent)}. Download them.")
    return files
