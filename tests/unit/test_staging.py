"""Weights read in pieces by several threads: as for a GPU, but to a CPU."""

from __future__ import annotations

import pytest
import torch
from support.weights import Model, checkpoint, halves, load, tensors

from mm_core.checkpoint import staging, weights
from mm_core.checkpoint.files import ITEM_BYTES, find_tensors
from mm_core.errors import CheckpointError


@pytest.fixture
def staged(monkeypatch):
    """Let the staged path take what it takes on a GPU, in pieces of 64 bytes; tells which tensors it took."""
    took: list[str] = []
    real = staging.copy_staged

    def take(tensors, *rest) -> None:
        took.extend(info.name for info in tensors)
        real(tensors, *rest)

    def fits(info, placements) -> bool:
        views = [placement.view() for placement in placements]
        return info.dtype in ITEM_BYTES and all(view.is_contiguous() for view in views)

    monkeypatch.setattr(staging, "PIECE_BYTES", 64)
    monkeypatch.setattr(weights, "stageable", fits)
    monkeypatch.setattr(weights, "copy_staged", take)
    return took


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_arrive_where_they_belong(tmp_path, staged, dtype):
    given = tensors()
    first, second = halves()
    model = load(checkpoint(tmp_path / "m", first, second), model=Model(dtype))
    assert sorted(staged) == sorted(given)
    want = torch.cat([given[f"model.attn.{n}_proj.weight"] for n in "qkv"]).to(dtype)
    assert torch.equal(model.attn.qkv.weight, want)
    assert torch.equal(model.attn.patch.weight, given["model.attn.patch.weight"].reshape(3, 12).to(dtype))
    assert torch.equal(model.embed_tokens.weight, given["model.embed_tokens.weight"].to(dtype))
    assert not any(p.isnan().any() for p in model.parameters())


def test_what_does_not_lie_in_one_piece_takes_the_other_way(tmp_path, staged):
    model = Model()
    model.head.weight.data = torch.full((4, 5), float("nan")).t()  # [5, 4], column by column
    given = tensors()
    load(checkpoint(tmp_path / "m", given), model=model)
    assert "lm_head.weight" not in staged
    assert "model.embed_tokens.weight" in staged
    assert torch.equal(model.head.weight, given["lm_head.weight"])


def test_broken_values_and_files_are_found_in_pieces_too(tmp_path, staged, monkeypatch):
    bad = {**tensors(), "lm_head.weight": torch.full((5, 4), float("inf"))}
    with pytest.raises(CheckpointError, match=r"1 tensors of .* are NaN or infinite.*lm_head\.weight"):
        load(checkpoint(tmp_path / "a", bad))
    found = checkpoint(tmp_path / "b", tensors())
    real = staging.os.preadv

    def cut(descriptor, buffers, offset) -> int:
        return 0 if offset > 600 else real(descriptor, [buffers[0][:7]], offset)

    monkeypatch.setattr(staging.os, "preadv", cut)
    with pytest.raises(CheckpointError, match=r"is damaged: it ends within tensor"):
        load(found)

    def refuse(*_) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(staging.os, "preadv", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\)"):
        load(found)


def test_short_reads_are_continued(tmp_path, staged, monkeypatch):
    real = staging.os.preadv
    monkeypatch.setattr(staging.os, "preadv", lambda file, buffers, at: real(file, [buffers[0][:5]], at))
    given = tensors()
    assert torch.equal(load(checkpoint(tmp_path / "m", given)).head.weight, given["lm_head.weight"])


def test_pieces_cover_a_tensor_once(tmp_path):
    found = checkpoint(tmp_path / "m", tensors())
    infos = find_tensors("m", found.path)
    cut = list(staging.pieces(infos.values(), 24))
    for info in infos.values():
        mine = [piece for piece in cut if piece.tensor is info]
        assert [p.first for p in mine] == list(range(0, info.nbytes // 4, 6))
        assert sum(p.nbytes for p in mine) == info.nbytes
        assert all(p.offset == info.offset + 4 * p.first and p.nbytes <= 24 for p in mine)
