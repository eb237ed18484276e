"""The encoder: items of all shapes and modalities in one pass, and the figures that `mm bench` takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_llava import Tiny

from mm_core.bench.models import write_model
from mm_core.checkpoint import load_weights, open_checkpoint
from mm_core.hookspecs import BuildContext, MediaRequest
from mm_core.testing import frames, picture
from mm_core.types import MediaFeature, MediaItem
from mm_plugin_llava.bench import encoder_flops, encoder_params, mm_bench
from mm_plugin_llava.encoder import LlavaEncoder
from mm_plugin_llava.processor import LlavaProcessor

ONEVISION = Tiny("llava_onevision", "siglip", "qwen2", "LlavaOnevision", config={"vision_aspect_ratio": "anyres_max_2"})


def features(processor: LlavaProcessor) -> list[MediaFeature]:
    """Pictures alone and one of several, wide and tall, and videos between them."""
    items = [
        (MediaItem("image", b"", picture(1, 150, 40)), 1),
        (MediaItem("video", b"", frames(2, 3)), 1),
        (MediaItem("image", b"", picture(3, 60, 61)), 2),
        (MediaItem("video", b"", frames(4, 1)), 1),
        (MediaItem("image", b"", picture(5, 300, 290)), 1),
    ]
    return [processor.prepare(i, processor.variant(i, MediaRequest({i.modality: n}))) for i, n in items]


def build(path: Path, device: str = "cpu") -> tuple[LlavaEncoder, LlavaProcessor]:
    """The encoder alone, with the checkpoint's weights."""
    checkpoint = open_checkpoint(str(path))
    encoder = LlavaEncoder.from_checkpoint(checkpoint, BuildContext(torch.device(device), torch.float32, 64))
    names = replace(encoder.weight_map, ignore=(*encoder.weight_map.ignore, r"language_model\."))
    load_weights(checkpoint, [(encoder, names)], show_progress=False)
    return encoder, LlavaProcessor(checkpoint)


@torch.inference_mode()
def test_all_in_one_pass_as_each_alone(tmp_path: Path) -> None:
    """Videos are normalised otherwise than pictures here, and then not."""
    path = ONEVISION.write(tmp_path)
    video = path / "video_preprocessor_config.json"
    video.write_text(json.dumps({"size": {"height": 38, "width": 38}, "image_mean": [0.1, 0.9, 0.3]}))
    rows = []
    for _ in range(2):
        encoder, processor = build(path)
        given = features(processor)
        together = encoder(given)
        for feature, mine in zip(given, together, strict=True):
            assert mine.shape == (feature.num_tokens, encoder.hidden_size)
            torch.testing.assert_close(mine, encoder([feature])[0], atol=1e-5, rtol=1e-5)
        assert encoder.cost(given[0]) == 25 * given[0].info["tiles"]
        rows.append(together)
        video.unlink(missing_ok=True)
    assert not torch.allclose(rows[0][1], rows[1][1], atol=1e-2)  # the video's own mean was taken
    torch.testing.assert_close(rows[0][0], rows[1][0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@torch.inference_mode()
def test_a_gpu_computes_the_same_without_waiting(tmp_path: Path) -> None:
    """Packs that come once, then captured, then replayed."""
    path = ONEVISION.write(tmp_path)
    (reference, processor), (encoder, _) = build(path), build(path, "cuda")
    given = features(processor)
    want = torch.cat(reference(given))
    there = [replace(f, tensors={k: t.cuda() for k, t in f.tensors.items()}) for f in given]
    encoder(there)
    encoder.use_graphs()
    for _ in range(4):
        torch.testing.assert_close(torch.cat(encoder(there)).cpu(), want, atol=1e-4, rtol=1e-4)
    captured = encoder._passes["image"]._captured._graphs
    assert len(captured) > 2
    torch.cuda.set_sync_debug_mode("error")
    try:
        encoder(there)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_to_encode(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(Tiny().write(tmp_path)))
    context = BuildContext(torch.device("cpu"), torch.float32, 64)
    assert LlavaEncoder.from_checkpoint(checkpoint, context)([]) == []


def test_figures_of_the_real_size(tmp_path: Path) -> None:
    """Against counts made here from the modules themselves."""
    model = mm_bench("llava").models["llava-1.5-7b"]
    checkpoint = open_checkpoint(str(write_model(model, tmp_path)))
    encoder = LlavaEncoder.from_checkpoint(checkpoint, BuildContext(torch.device("meta"), torch.bfloat16, 64))
    matrices = [p for n, p in encoder.named_parameters() if p.dim() == 2 and "position" not in n]
    assert encoder_params(checkpoint.config) == sum(p.numel() for p in matrices)
    assert len(encoder.tower.layers) == 23
    feature = LlavaProcessor(checkpoint).prepare(MediaItem("image", b"", picture(1, 448, 448)), b"")
    assert (feature.num_tokens, encoder.cost(feature)) == (576, 576)
    flops = encoder_flops(checkpoint.config, feature.info)
    assert 0.35e12 < flops < 0.42e12  # two operations a weight and row, and some for attention
    assert mm_bench("llava_onevision").models == {}
