"""`mm bench serve` on a real server, and the checkpoints without weights that it can serve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.serving import Server

from mm_core.bench.models import write_checkpoint
from mm_core.cli import main
from mm_core.errors import ConfigError
from mm_core.plugins import PluginRegistry


def test_load_on_a_server(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, page = tmp_path / "out.json", tmp_path / "out.html"
    argv = ["bench", "serve", "--url", f"{server.url}/v1", "--api-key", server.keys[0], "--image-size", "112"]
    argv += ["--workload", "serve-poisson-10,serve-chat,serve-burst", "--requests", "4", "--rate", "20", "--turns", "2"]
    argv += ["--think-s", "0.1", "--output-tokens", "5", "--warmup", "2", "--health", "--html", str(page)]
    assert main([*argv, "--json", str(file)]) == 0, capsys.readouterr().err
    found = {figures["workload"]: figures for figures in json.loads(file.read_text())["results"]}
    for name, figures in found.items():
        assert figures["requests"] == {"sent": 8, "good": 8, "failed": 0}, (name, figures["errors"])
        assert figures["tokens"]["short"] == 0
        assert figures["tokens"]["output"] == 8 * 5
        assert figures["tokens"]["prompt_min"] > 16
        assert set(figures["health"]["statuses"]) == {"200"}
    assert found["serve-burst"]["ttft_ms"] is None
    streamed = found["serve-poisson-10"]
    assert 0 < streamed["ttft_ms"]["p50"] <= streamed["e2e_ms"]["p50"]
    first, second = found["serve-chat"]["turns"]
    # A second turn repeats the first one, which is in the cache but for the end of its last block.
    assert second["cached"] >= first["prompt"] - 4 * 16
    assert page.read_text().count("<h2>") == 3


def test_a_wrong_key_is_told(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--url", server.url, "--api-key", "wrong", "--requests", "1"]) == 1
    assert "lists no model (status 401). Check --url and --api-key" in capsys.readouterr().err


def test_checkpoints_without_weights_have_the_workloads_prompt(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = write_checkpoint("qwen2-vl-7b", PluginRegistry(), tmp_path / "made")
    tokenizer = AutoTokenizer.from_pretrained(path)
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."},
             {"role": "user", "content": "Sure?"}]  # fmt: skip
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    first = f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?{tail}"
    assert text == f"{first}A cat.<|im_start|>user\nSure?{tail}"
    ids = tokenizer.encode("<|im_start|>user\nab", add_special_tokens=False)
    assert len(ids) == 1 + len("user\nab")  # a token a byte: --prompt-tokens meets any number
    with pytest.raises(ConfigError, match=r"no built-in size\. There are: .*qwen2-vl-7b"):
        write_checkpoint("fly", PluginRegistry(), tmp_path / "no")
