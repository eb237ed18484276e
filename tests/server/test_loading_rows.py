"""Checkpoints that should not be served: `mm serve` says why in one line, exits with 1, and leaves nothing running."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.e2e import LEAKS

from mm_core.cli import main
from mm_core.zoo import default_model

KEPT = ("*.json", "*.safetensors", "*.jinja", "*.txt")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The zoo's model, to be damaged."""
    target = tmp_path / "model"
    target.mkdir()
    for pattern in KEPT:
        for file in default_model().glob(pattern):
            shutil.copy(file, target)
    return target


def weights(model: Path) -> Path:
    return model / "model.safetensors"


def edit(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(weights(model))
    change(tensors)
    save_file(tensors, weights(model))


def absent_shard(model: Path) -> None:
    names = list(load_file(weights(model)))
    index = {
        "metadata": {},
        "weight_map": {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)},
    }
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    weights(model).rename(model / "model-00001-of-00002.safetensors")


def truncated(model: Path) -> None:
    data = weights(model).read_bytes()
    weights(model).write_bytes(data[: len(data) // 2])


def endless_header(model: Path) -> None:
    data = weights(model).read_bytes()
    weights(model).write_bytes((2**40).to_bytes(8, "little") + data[8:])


def missing(model: Path) -> None:
    edit(model, lambda tensors: tensors.pop(next(n for n in tensors if n.endswith("mlp.down_proj.weight"))))


def unknown(model: Path) -> None:
    edit(model, lambda tensors: tensors.update({"model.layers.99.mlp.down_proj.weight": torch.zeros(2, 2)}))


def other_shape(model: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = next(n for n in tensors if n.endswith("mlp.down_proj.weight"))
        tensors[name] = tensors[name][:-1].contiguous()

    edit(model, change)


def no_numbers(model: Path) -> None:
    edit(model, lambda tensors: next(iter(tensors.values())).fill_(float("nan")))


def pickled(model: Path) -> None:
    weights(model).unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04N.")


def other_vocabulary(model: Path) -> None:
    """The tokenizer knows more than the model has embeddings for."""
    file = model / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    last = max(token["id"] for token in tokenizer["added_tokens"])
    tokenizer["model"]["vocab"] |= {f"more{i}": last + i for i in range(1, 100)}
    file.write_text(json.dumps(tokenizer), encoding="utf-8")


def unknown_architecture(model: Path) -> None:
    file = model / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "architectures": ["NobodyForConditionalGeneration"]}))


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


ROWS = [
    (absent_shard, "model-00002-of-00002.safetensors"),
    (truncated, "model.safetensors"),
    (endless_header, "model.safetensors"),
    (missing, "mlp.down_proj.weight"),
    (unknown, "layers.99"),
    (other_shape, "mlp.down_proj.weight"),
    (no_numbers, "finite"),
    (pickled, "safetensors"),
    (other_vocabulary, "tokenizer"),
    (unknown_architecture, "NobodyForConditionalGeneration"),
    (no_config, "config.json"),
]


def serve(capsys: pytest.CaptureFixture[str], model: Path, *options: str) -> str:
    """The one line that it says before it ends."""
    children = set(psutil.Process().children(recursive=True))
    code = main(["serve", str(model), "--port", "0", "--decode-workers", "0", *options])
    shown = capsys.readouterr()
    assert code == 1, shown.err
    assert "listening" not in shown.out
    lines = [line for line in shown.err.splitlines() if line.startswith("mm: error: ")]
    assert len(lines) == 1, shown.err
    assert "Traceback" not in shown.err
    assert not [p for p in psutil.Process().children(recursive=True) if p not in children]
    return lines[0]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("damage", "says"), ROWS, ids=[damage.__name__ for damage, _ in ROWS])
def test_what_cannot_be_served_is_told(
    copy: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], says: str
) -> None:
    damage(copy)
    line = serve(capsys, copy, "--in-process")
    assert says in line
    assert not LEAKS.search(line.replace(str(copy), "")), line


def test_it_is_the_same_line_from_a_process_of_its_own(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing(copy)
    assert serve(capsys, copy) == serve(capsys, copy, "--in-process")


def test_code_beside_a_checkpoint_never_runs(copy: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A model with `auto_map` is loaded as if it had none; it fails here only by its missing weights."""
    canary = tmp_path / "touched"
    source = f"from pathlib import Path\nPath({str(canary)!r}).touch()\nclass Config: ...\n"
    for name in ("configuration.py", "modeling.py", "tokenization.py", "processing.py"):
        (copy / name).write_text(source)
    named = {"AutoConfig": "configuration.Config", "AutoModel": "modeling.Config", "AutoProcessor": "processing.Config"}
    for file in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        path = copy / file
        if path.exists():
            settings = {
                **json.loads(path.read_text()),
                "auto_map": {**named, "AutoTokenizer": ["tokenization.Config", None]},
            }
            path.write_text(json.dumps(settings))
    missing(copy)
    assert "mlp.down_proj.weight" in serve(capsys, copy, "--in-process")
    assert not canary.exists()
