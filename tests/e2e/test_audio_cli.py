"""`mm run` with a recording."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile
from support.tiny_whisper import make_tiny_whisper, sound

from mm_core.cli import main


def test_a_recording_is_heard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, wav = make_tiny_whisper(tmp_path), tmp_path / "clip.wav"
    soundfile.write(wav, sound(1.5, 1), 16000)
    command = ["run", str(model), "", "--max-tokens", "6", "--device", "cpu"]
    assert main([*command, "--audio", str(wav)]) == 0
    heard = capsys.readouterr()
    assert heard.out.strip()
    assert "1500 of media" in heard.err
    assert main([*command, "--media", str(wav)]) == 0
    assert capsys.readouterr().out == heard.out
    assert main([*command, "--audio", str(tmp_path / "none.wav")]) == 1
    assert "none.wav" in capsys.readouterr().err
