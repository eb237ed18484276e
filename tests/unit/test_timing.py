"""How long decoding and passes on the device took, as `stats` tells it."""

from __future__ import annotations

import time

import pytest
import torch
from PIL import Image

from mm_core.errors import MediaDecodeError
from mm_core.media.decode import MediaLimits
from mm_core.media.decoder import LocalDecoder
from mm_core.media.timing import TimedDecoder
from mm_core.runner.stopwatch import Stopwatch


def test_decoding_is_counted_by_modality_failures_too(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8), "red").save(path)
    decoder = TimedDecoder(LocalDecoder(MediaLimits()))
    assert decoder.taken() == {}
    image, pixels = decoder.image(path.read_bytes())
    assert (image.size, len(pixels)) == ((8, 8), 192)
    with pytest.raises(MediaDecodeError):
        decoder.image(b"\x89PNG\r\n\x1a\n no more")
    taken = decoder.taken()
    assert list(taken) == ["image"]
    assert taken["image"]["items"] == 2
    assert 0 < taken["image"]["seconds"] < 5
    decoder.close()


def test_a_stopwatch_adds_up_and_leaves_failures_out():
    watch = Stopwatch(torch.device("cpu"))
    assert watch.seconds() == 0
    for _ in range(2):
        with watch.running():
            time.sleep(0.02)
    counted = watch.seconds()
    assert 0.04 <= counted < 5
    with pytest.raises(ValueError, match="no"), watch.running():
        raise ValueError("no")
    assert watch.seconds() == counted
