"""A benchmark's file of requests: both layouts, both spellings, and what is wrong with others."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from mm_core.bench.dataset import DEFAULT_OUTPUT_TOKENS, read_dataset, stand_in
from mm_core.bench.workloads import INSTRUCTION, BenchRequest
from mm_core.errors import DatasetError
from mm_core.types import TextPrompt

ENTRIES = [
    {"prompt": "a", "media": ["pictures/one.png", "clip.mp4"], "output_tokens": 5},
    {"prompt": "b", "media_paths": ["pictures/one.png"]},
    {"prompt": "c", "media_paths": "sound.WAV"},
    {"prompt": "d"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for name in ("pictures/one.png", "clip.mp4", "sound.WAV"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "requests.json"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("layout", ["lines", "list", "blank lines"])
def test_layouts_and_spellings(folder: Path, layout: str) -> None:
    lines = [json.dumps(e) for e in ENTRIES]
    text = json.dumps(ENTRIES, indent=2) if layout == "list" else ("\n\n" if "blank" in layout else "\n").join(lines)
    requests = read_dataset(write(folder, text), None, None)
    assert [r.prompt.prompt for r in requests] == ["a", "b", "c", "d"]
    assert [r.output_tokens for r in requests] == [5, *[DEFAULT_OUTPUT_TOKENS] * 3]
    assert [r.prompt.multi_modal_data for r in requests] == [
        {"image": [b"pictures/one.png"], "video": [b"clip.mp4"]}, {"image": [b"pictures/one.png"]},
        {"audio": [b"sound.WAV"]}, None,
    ]  # fmt: skip
    assert {r.expected_tokens for r in requests} == {None}


def test_count_takes_the_first_or_begins_again(folder: Path) -> None:
    path = write(folder, "\n".join(json.dumps(e) for e in ENTRIES) + "\nnot read\n")
    assert [r.prompt.prompt for r in read_dataset(path, 2, 9)] == ["a", "b"]
    assert {r.output_tokens for r in read_dataset(path, 2, 9)} == {9}
    path = write(folder, json.dumps(ENTRIES))
    assert [r.prompt.prompt for r in read_dataset(path, 6, None)] == ["a", "b", "c", "d", "a", "b"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"prompt": "a"}\n{"prompt": ', r"line 2: not JSON"),
        ('{"prompt": "a"}\n[]', r"line 2: want an object with a text `prompt`"),
        ('\n{"prompt": 3}', r"line 2: want an object"),
        ('[{"prompt": "a"},\n {"prompt": "b"', r"line 2: not JSON"),
        ('[{"prompt": "a"}, 3]', r"entry 2: want an object"),
        ('{"prompt": "a", "meda": []}', r"line 1: 'meda' is not known. Keys: media, media_paths, output_tokens, pr"),
        ('{"prompt": "a", "media": [], "media_paths": []}', r"line 1: .*two spellings"),
        ('{"prompt": "a", "media": [3]}', r"line 1: `media` is a list of paths"),
        ('{"prompt": "a", "media": ["absent.png"]}', r"line 1: media file .*absent\.png cannot be read \(FileNotFound"),
        ('{"prompt": "a", "output_tokens": 0}', r"line 1: `output_tokens` is a whole number from 1; found '0'"),
        ('{"prompt": "a", "output_tokens": "5"}', r"line 1: `output_tokens`"),
        ("\n\n", r"holds no requests"),
        ("[]", r"holds no requests"),
    ],
)
def test_faults_are_told_with_their_place(folder: Path, text: str, fault: str) -> None:
    with pytest.raises(DatasetError, match=fault):
        read_dataset(write(folder, text), None, None)


def test_files_that_cannot_be_read(folder: Path) -> None:
    with pytest.raises(DatasetError, match=r"cannot be read \(FileNotFoundError\)"):
        read_dataset(folder / "absent.jsonl", None, None)
    (folder / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match="Give a UTF-8 file"):
        read_dataset(folder / "binary", None, None)


def test_a_warm_up_has_noise_of_the_same_sizes() -> None:
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "PNG")
    video = BenchRequest(TextPrompt(prompt="v", multi_modal_data={"video": [b"?"]}), 3)
    images = BenchRequest(TextPrompt(prompt="i", multi_modal_data={"image": [file.getvalue()] * 2}), 4)
    broken = BenchRequest(TextPrompt(prompt="b", multi_modal_data={"image": [b"?"]}), 5)
    found = stand_in([video, images])
    assert (found.prompt.prompt, found.output_tokens) == ("i", 4)
    first, second = found.prompt.multi_modal_data["image"]
    assert first.size == second.size == (40, 30)
    assert first.tobytes() != second.tobytes()
    for requests in ([video], [broken, images]):
        assert stand_in(requests).prompt == TextPrompt(prompt=INSTRUCTION)
