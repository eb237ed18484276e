"""What was used only in part is said with the answer: a sound file that was cut off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.clips import sound
from support.tiny_whisper import make_tiny_whisper

from mm_core import Engine, KvCacheConfig, SamplingParams, TextPrompt

GREEDY = SamplingParams(max_tokens=4, temperature=0.0)
WHOLE = sound(2.0)
CUT = WHOLE[: len(WHOLE) // 2]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module", params=[0, 1], ids=["threads", "workers"])
def engine(path: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    options: dict[str, Any] = {"decode_workers": request.param, "show_progress": False}
    with Engine.from_pretrained(path, kv_cache_config=KvCacheConfig(num_blocks=256), **options) as made:
        yield made


def ask(data: Any, uuid: str | None = None) -> TextPrompt:
    names = None if uuid is None else {"audio": [uuid]}
    prompt = "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"
    return TextPrompt(prompt=prompt, multi_modal_data={"audio": [data]}, multi_modal_uuids=names)


def test_a_cut_off_file_is_named(engine: Engine) -> None:
    (whole,) = engine.generate(ask(WHOLE), GREEDY)
    assert whole.warnings == ()
    (cut,) = engine.generate(ask(CUT, "talk"), GREEDY)
    assert cut.warnings == ("Item 1 (audio) was cut off: 1.00 s of it are there and were used.",)
    (again,) = engine.generate(ask(CUT), GREEDY)  # its bytes are known: nothing is decoded
    (named,) = engine.generate(ask(None, "talk"), GREEDY)
    assert again.warnings == named.warnings == cut.warnings
    assert {output.warnings for output in engine.stream(ask(CUT), GREEDY)} == {cut.warnings}
    (other,) = engine.generate(ask(WHOLE, "talk"), GREEDY)
    assert other.warnings == ()
