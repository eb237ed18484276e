"""Real layouts, end to end: what the hub holds and what transformers 5 writes load to the same parameters."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from support.tiny import make_tiny_qwen2vl

from mm_core.checkpoint import LoadedCheckpoint, load_weights, open_checkpoint
from mm_core.decoders import default
from mm_core.errors import CheckpointError
from mm_core.hookspecs import BuildContext
from mm_core.plugins import PluginRegistry


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Makes each tiny checkpoint once."""
    folder = tmp_path_factory.mktemp("tiny")
    return cache(lambda *what, **more: make_tiny_qwen2vl(folder, *what, **more))


def build(checkpoint: LoadedCheckpoint):
    registry = PluginRegistry()
    owner = registry.resolve(checkpoint.architectures)
    common = {"family": owner.family.name, "checkpoint": checkpoint}
    context = BuildContext(torch.device("cpu"), torch.float32, 256)
    spec = registry.call_owner("mm_decoder", owner, default=default, **common)
    encoder = registry.call_owner("mm_encoder", owner, context=context, **common)
    return (encoder, encoder.weight_map), (spec.build(context), spec.weight_map)


def parameters(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(str(path))
    targets = build(checkpoint)
    for module, _ in targets:
        for param in module.parameters():
            param.data.fill_(float("nan"))
    load_weights(checkpoint, targets, show_progress=False)
    found = {f"{i}.{n}": p for i, (module, _) in enumerate(targets) for n, p in module.named_parameters()}
    assert not any(p.isnan().any() for p in found.values())
    return found


@pytest.mark.parametrize("version", ["2", "2.5"])
@pytest.mark.parametrize("tied", [True, False])
def test_both_layouts_load_to_the_same_parameters(tiny, version, tied):
    hub = parameters(tiny(version, "hub", tied, shards=1))
    for other in (tiny(version, "tf5", tied, shards=1), tiny(version, "hub", tied, shards=3)):
        found = parameters(other)
        assert found.keys() == hub.keys()
        assert all(torch.equal(found[name], hub[name]) for name in hub)


@pytest.mark.parametrize("version", ["2", "2.5"])
def test_both_layouts_give_the_same_settings(tiny, version):
    one, two = (open_checkpoint(str(tiny(version, layout, True))) for layout in ("hub", "tf5"))
    names = ("hidden_size", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling")
    assert [one.text_config[n] for n in names] == [two.text_config[n] for n in names]
    assert one.text_config["rope_scaling"]["type"] == "mrope"
    assert one.text_config["tie_word_embeddings"] is two.text_config["tie_word_embeddings"] is True
    assert one.tokenizer.encode("a cat<|image_pad|>") == two.tokenizer.encode("a cat<|image_pad|>")
    for part in (one.processor_config["image_processor"], two.processor_config["image_processor"]):
        assert (part["patch_size"], part["merge_size"]) == (14, 2)


def test_a_missing_layer_is_named(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    source = tiny("2", "hub", True, shards=1)
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"], tensors["visual.blocks.0.norm1.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"2 parameters are missing: .*norm1\.bias.*qkv\S* \(shard 1 of"):
        parameters(tmp_path)
