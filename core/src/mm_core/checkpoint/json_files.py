"""JSON files of a checkpoint, read with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mm_core.errors import CheckpointError

# Keys by which a checkpoint asks transformers to import its Python files.
_CODE_KEYS = frozenset({"auto_map", "custom_pipelines", "trust_remote_code"})
_MAX_JSON_BYTES = 512 * 2**20


def read_json_object(file: Path) -> dict[str, Any]:
    """Parse a file that must hold one JSON object; CheckpointError names the file otherwise."""
    try:
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"'{file}' is larger than {_MAX_JSON_BYTES} bytes: not a settings file.")
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"'{file}' cannot be read ({error.strerror}). Check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"'{file}' is not valid JSON ({error}). The download may be incomplete: fetch the file again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"'{file}' holds a JSON {type(value).__name__}, not an object. Fetch the file again.")
    return value


def strip_code(value: Any) -> Any:
    """The same settings without the keys that name Python code, at any depth."""
    if isinstance(value, dict):
        return {key: strip_code(item) for key, item in value.items() if key not in _CODE_KEYS}
    if isinstance(value, list):
        return [strip_code(item) for item in value]
    return value
