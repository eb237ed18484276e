"""What is written of a call's body, where that is asked for."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from mm_core.server.logs import log_asked

SOUND = "UklGR" * 20


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": SOUND, "format": "wav"}},
        {"type": "input_audio", "input_audio": {"data": SOUND[:20], "format": "wav"}},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{SOUND}"}},
        {"type": "image_url", "image_url": f" DATA:image/png;base64,{SOUND}"},
        {"type": "video_url", "video_url": {"url": "https://a.example/" + SOUND * 10}},
    ],
)
def test_media_in_a_body_are_not_logged(part: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mm_core.server.prompts"):
        text = {"type": "text", "text": "What is it?"}
        log_asked("req-1", {"messages": [{"role": "user", "content": [part, text]}], "other": {"image": SOUND * 10}})
    (record,) = caplog.records
    body = json.loads(record.fields["body"])  # type: ignore[attr-defined]
    assert "UklGR" not in str(body)
    assert body["messages"][0]["content"][1]["text"] == "What is it?"


def test_short_addresses_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    part = {"type": "image_url", "image_url": {"url": "https://a.example/cat.png"}}
    with caplog.at_level(logging.INFO, "mm_core.server.prompts"):
        log_asked("req-1", {"messages": [{"role": "user", "content": [part]}]})
    assert "https://a.example/cat.png" in caplog.records[0].fields["body"]  # type: ignore[attr-defined]
