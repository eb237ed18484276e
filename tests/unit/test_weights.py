"""Streaming load: names, fused shards, ties, and every way in which weights do not fit."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from support.weights import MAP, TIED, Model, checkpoint, halves, load, tensors
from torch import nn

from mm_core.checkpoint import (
    init_dummy_weights,
    load_weights,
    open_checkpoint,
    weights,
)
from mm_core.errors import CheckpointError, PluginError
from mm_core.hookspecs import WeightMap


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rename_fuse_reshape_cast(tmp_path, dtype):
    given = tensors()
    model = load(checkpoint(tmp_path / "m", {**given, "model.rope.inv_freq": torch.ones(2)}), model=Model(dtype))
    want = torch.cat([given[f"model.attn.{n}_proj.weight"] for n in "qkv"]).to(dtype)
    assert torch.equal(model.attn.qkv.weight, want)
    assert torch.equal(model.attn.qkv.bias, torch.cat([given[f"model.attn.{n}_proj.bias"] for n in "qkv"]).to(dtype))
    assert torch.equal(model.attn.patch.weight, given["model.attn.patch.weight"].reshape(3, 12).to(dtype))
    assert torch.equal(model.head.weight, given["lm_head.weight"].to(dtype))
    assert not any(p.isnan().any() for p in model.parameters())


def test_two_modules_share_a_checkpoint(tmp_path):
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(2, 2)

    given = {**tensors(), "visual.proj.weight": torch.ones(2, 2), "visual.proj.bias": torch.zeros(2)}
    model, tower = Model(), Tower()
    found = checkpoint(tmp_path / "m", given)
    load_weights(found, [(model, MAP), (tower, WeightMap(rename=((r"visual\.", ""),)))], show_progress=False)
    assert torch.equal(tower.proj.weight, given["visual.proj.weight"])
    with pytest.raises(CheckpointError, match=r"2 tensors are unexpected: visual\.proj\.bias, visual\.proj\.weight"):
        load(found)


def test_tied_parameters_become_one(tmp_path):
    given = tensors()
    head = given.pop("lm_head.weight")
    model = load(checkpoint(tmp_path / "a", given), TIED)
    assert model.head.weight is model.embed_tokens.weight
    assert torch.equal(model.head.weight, given["model.embed_tokens.weight"])
    # Both are there: the shared one counts, as in transformers.
    model = load(checkpoint(tmp_path / "b", {**given, "lm_head.weight": head}), TIED)
    assert torch.equal(model.head.weight, given["model.embed_tokens.weight"])
    # Only the alias is there.
    del given["model.embed_tokens.weight"]
    model = load(checkpoint(tmp_path / "c", {**given, "lm_head.weight": head}), TIED)
    assert torch.equal(model.embed_tokens.weight, head)
    assert model.head.weight is model.embed_tokens.weight


def test_shards_by_index(tmp_path):
    first, second = halves()
    model = load(checkpoint(tmp_path / "m", first, second))
    assert torch.equal(model.head.weight, second["lm_head.weight"])


def test_index_decides_between_copies(tmp_path):
    first, second = halves()
    stale = {**first, "lm_head.weight": torch.full((5, 4), 9.0)}
    found = checkpoint(tmp_path / "m", stale, second)  # the index names the second shard
    assert torch.equal(load(found).head.weight, second["lm_head.weight"])


def test_absent_shards_are_listed_before_anything_loads(tmp_path):
    first, second = halves()
    found = checkpoint(tmp_path / "m", first, second, {})
    for i in (2, 3):
        (tmp_path / "m" / f"model-0000{i}-of-00003.safetensors").unlink()
    index = {**dict.fromkeys(first, "model-00001-of-00003.safetensors"), "x": "model-00003-of-00003.safetensors"}
    index |= dict.fromkeys(second, "model-00002-of-00003.safetensors")
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    model = Model()
    with pytest.raises(CheckpointError, match=r"2 of them absent: model-00002-of-00003\S+ model-00003-of-00003"):
        load(found, model=model)
    assert all(p.isnan().all() for p in model.parameters())


def test_absent_shards_without_an_index(tmp_path):
    first, second = halves()
    found = checkpoint(tmp_path / "m", first, second)
    (tmp_path / "m" / "model.safetensors.index.json").unlink()
    load(found)
    (tmp_path / "m" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 shards are absent: model-00002-of-00002\.safetensors"):
        load(found)


def test_tensor_outside_its_indexed_shard(tmp_path):
    first, second = halves()
    one, two = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    index = {**dict.fromkeys(first, one), **dict.fromkeys(second, two), "lm_head.weight": one}
    with pytest.raises(CheckpointError, match=r"not in the file the index names: lm_head\.weight \(model-00001"):
        load(checkpoint(tmp_path / "m", first, second, index=index))


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", 3])
def test_index_may_not_leave_the_directory(tmp_path, file):
    first, second = halves()
    with pytest.raises(CheckpointError, match=r"only .*safetensors files beside the index"):
        load(checkpoint(tmp_path / "m", first, second, index={"x": file}))


def test_all_misfits_are_listed_at_once(tmp_path):
    given = tensors()
    del given["model.attn.k_proj.weight"], given["lm_head.weight"]
    given |= {"model.embed_tokens.weight": torch.ones(6, 4), "model.attn.what": torch.ones(1), "other.w": torch.ones(1)}
    given["model.attn.v_proj.bias"] = torch.ones(2, dtype=torch.int8)
    model = Model()
    with pytest.raises(CheckpointError) as caught:
        load(checkpoint(tmp_path / "m", given), model=model)
    text = str(caught.value)
    assert "2 parameters are missing: attn.qkv.weight (shard 1 of 3), head.weight;" in text
    assert "2 tensors are unexpected: model.attn.what, other.w;" in text
    assert "1 tensors have a wrong shape: model.embed_tokens.weight [6, 4] for embed_tokens.weight [5, 4];" in text
    assert "floating weights are wanted: model.attn.v_proj.bias (I8)." in text
    assert all(p.isnan().all() for p in model.parameters())  # nothing was loaded


def test_long_lists_are_cut_and_counted(tmp_path):
    given = {**tensors(), **{f"extra.{i:03d}": torch.ones(1) for i in range(50)}}
    with pytest.raises(CheckpointError, match=r"50 tensors are unexpected: .*extra\.019 … and 30 more"):
        load(checkpoint(tmp_path / "m", given))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_weights_are_refused(tmp_path, bad):
    given = tensors()
    given["model.attn.k_proj.weight"][1, 1] = bad
    with pytest.raises(CheckpointError, match=r"1 tensors .* NaN or infinite.*model\.attn\.k_proj\.weight"):
        load(checkpoint(tmp_path / "m", given))


def test_overflow_by_the_cast_is_refused(tmp_path):
    given = tensors()
    given["lm_head.weight"][0, 0] = 1e6
    load(checkpoint(tmp_path / "m", given))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load(checkpoint(tmp_path / "n", given), model=Model(torch.float16))


def header(entries: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = json.dumps(entries).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(begin: int, end: int, dtype: str = "F32", shape: tuple[int, ...] = (1,)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"\0" * 64,
        header({}, length=2**40),
        header({}, length=2**64 - 1),
        header({"a": entry(0, 4), "b": entry(0, 4)}, b"\0" * 4),
        header({"a": entry(0, 4), "b": entry(2, 6)}, b"\0" * 6),
        header({"a": entry(0, 4), "b": entry(8, 12)}, b"\0" * 12),
        header({"a": entry(4, 0)}, b"\0" * 4),
        header({"a": entry(0, 4)}, b"\0" * 8),
        header({"a": entry(0, 2**50)}, b"\0" * 8),
        header({"a": {"dtype": "F32"}}),
        header({"a": 3}),
        header(["a"]),
        b"\x05\0\0\0\0\0\0\0{{{{{",
        header({"model.embed_tokens.weight": entry(0, 4)}, b"\0" * 4),
    ],
)
def test_corrupt_files_are_refused(tmp_path, content):
    found = checkpoint(tmp_path / "m", tensors())
    (tmp_path / "m" / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError):
        load(found)


@pytest.mark.parametrize("keep", [0.01, 0.5, 0.999])
def test_truncated_files_are_refused(tmp_path, keep):
    found = checkpoint(tmp_path / "m", tensors())
    file = tmp_path / "m" / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * keep)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors' is damaged.*fetch the file again"):
        load(found)


def test_shape_that_lies_about_its_bytes(tmp_path):
    found = checkpoint(tmp_path / "m", tensors())
    file = tmp_path / "m" / "model.safetensors"
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    entries = json.loads(raw[8 : 8 + size])
    entries["model.attn.q_proj.bias"]["shape"] = [4]
    entries["model.attn.q_proj.bias"]["dtype"] = "F64"
    file.write_bytes(header(entries, raw[8 + size :]))
    with pytest.raises(CheckpointError, match="is damaged"):
        load(found)


def test_no_weights_at_all(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors weights.*load_format='dummy'"):
        load(open_checkpoint(str(tmp_path)))


def test_fused_without_shard_sizes_is_the_plugins_fault(tmp_path):
    model = Model()
    model.attn.qkv.weight.shard_sizes = (4, 2)
    with pytest.raises(PluginError, match="shard_sizes"):
        load(checkpoint(tmp_path / "m", tensors()), model=model)


def test_progress_bar_only_for_slow_loads(tmp_path, capsys):
    load_weights(checkpoint(tmp_path / "m", tensors()), [(Model(), MAP)], show_progress=True)
    assert capsys.readouterr().err == ""


def test_progress_bar_for_slow_loads(tmp_path, capsys, monkeypatch):
    import time

    read = weights._read
    monkeypatch.setattr(weights, "_read", lambda *what: (time.sleep(0.3) or pair for pair in read(*what)))
    found = checkpoint(tmp_path / "m", tensors())
    load_weights(found, [(Model(), MAP)], show_progress=True)
    assert "Loading weights: " in capsys.readouterr().err
    load_weights(found, [(Model(), MAP)], show_progress=False)
    assert capsys.readouterr().err == ""


# --- random weights


def test_dummy_weights_are_deterministic_by_name():
    one, two, other = Model(), Model(), Model()
    init_dummy_weights(one, 1)
    init_dummy_weights(two, 1)
    init_dummy_weights(other, 2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)
    alone = nn.ModuleDict({"head": nn.Linear(4, 5, bias=False)})
    init_dummy_weights(alone, 1)
    assert torch.equal(alone["head"].weight, one.head.weight)


def test_dummy_weights_are_well_scaled():
    module = nn.ModuleDict(
        {"proj": nn.Linear(256, 512), "norm": nn.LayerNorm(4096), "embed_tokens": nn.Embedding(1000, 256)}
    ).to(torch.bfloat16)
    init_dummy_weights(module, 0)
    assert module["proj"].weight.std().item() == pytest.approx(1 / 16, rel=0.05)
    assert module["proj"].bias.abs().max() < 0.15
    assert module["norm"].weight.mean().item() == pytest.approx(1.0, abs=0.02)
    assert module["embed_tokens"].weight.std().item() == pytest.approx(0.25, rel=0.05)
    out = module["proj"](torch.randn(8, 256, dtype=torch.bfloat16))
    assert 0.5 < out.std().item() < 2.0


def test_dummy_weights_tie():
    model = Model()
    init_dummy_weights(model, 0, weight_map=TIED)
    assert model.head.weight is model.embed_tokens.weight
