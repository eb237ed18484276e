"""The engine on a real GPU: parity in fp32, bf16 against fp32, and Qwen2-VL-7B at its real size."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from support.pictures import frames, picture
from support.real_size import make_dummy_qwen2vl
from support.reference import Reference
from support.tiny import make_tiny_qwen2vl
from support.video import reference_video

from mm_core import Engine, KvCacheConfig, SamplingParams, TextPrompt

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, logprobs=4)


def jobs() -> list[tuple[str, list, list]]:
    return [
        ("The quick brown fox jumps over the", [], []),
        (f"<|im_start|>user\n{IMAGE}Describe this image.", [picture(1, 150, 100)], []),
        (f"<|im_start|>user\n{IMAGE}{IMAGE}Both?", [picture(2, 60, 90), picture(3, 300, 80)], []),
        (f"{VIDEO}What is there to see", [], [frames(4, 5)]),
    ]


def as_prompt(text: str, images: list, clips: list) -> TextPrompt:
    data = {"image": images, "video": [{"frames": c, "fps": 2.0} for c in clips]}
    return TextPrompt(prompt=text, multi_modal_data={k: v for k, v in data.items() if v})


@pytest.mark.parametrize("version", ["2", "2.5"])
@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
                                        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}])  # fmt: skip
def test_fp32_tokens_equal_transformers(tmp_path: Path, version: str, sizes: dict) -> None:
    path = make_tiny_qwen2vl(tmp_path, version=version, **sizes)
    reference = Reference(path)
    wanted = []
    for text, images, clips in jobs():
        videos = [reference_video(c, fps=2.0) for c in clips]
        # An ended reference proves less: compare as far as it goes.
        wanted.append(reference.generate(text, images, videos, max_tokens=24))
    kv = KvCacheConfig(num_blocks=512)
    with Engine.from_pretrained(path, dtype="float32", kv_cache_config=kv, max_num_batched_tokens=16) as engine:
        for _ in range(2):  # cold, then reused
            outputs = engine.generate([as_prompt(*j) for j in jobs()], GREEDY)
            for output, answer in zip(outputs, wanted, strict=True):
                assert list(output.prompt_token_ids) == answer.prompt_ids
                assert list(output.token_ids)[: len(answer.token_ids)] == answer.token_ids
                expected = torch.log_softmax(answer.logits[0].float(), -1)
                for token, entry in output.logprobs[0].items():
                    assert abs(entry.logprob - float(expected[token])) < 5e-4
        assert engine.stats()["partial_prefills"] > 0
        assert outputs[1].usage.cached_tokens > 0


def test_bf16_errs_no_more_than_transformers(tmp_path: Path) -> None:
    """bf16 rounds: never gated on tokens, only on how far its log-probabilities are from fp32's, and
    transformers' own bf16 run is the bar."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
             "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}  # fmt: skip
    path = make_tiny_qwen2vl(tmp_path, **sizes)
    exact, rounded = Reference(path), Reference(path, torch.bfloat16)
    first = SamplingParams(max_tokens=1, temperature=0, logprobs=64)
    with Engine.from_pretrained(path, dtype="bfloat16", kv_cache_config=KvCacheConfig(num_blocks=512)) as engine:
        outputs = engine.generate([as_prompt(*job) for job in jobs()[:3]], first)
    ours, theirs = [], []
    for (text, images, _), output in zip(jobs()[:3], outputs, strict=True):
        wanted = torch.log_softmax(exact.generate(text, images, max_tokens=1).logits[0].float(), -1)
        other = torch.log_softmax(rounded.generate(text, images, max_tokens=1).logits[0].float(), -1)
        ours += [abs(entry.logprob - float(wanted[token])) for token, entry in output.logprobs[0].items()]
        theirs += [abs(float(other[token] - wanted[token])) for token in output.logprobs[0]]
    print(f"\nbf16 against fp32, mean error of log-probabilities: {np.mean(ours):.4f}, "
          f"transformers {np.mean(theirs):.4f}")  # fmt: skip
    assert np.mean(ours) < 1.3 * np.mean(theirs) + 0.01


def test_qwen2_vl_7b_with_dummy_weights(tmp_path: Path) -> None:
    path = make_dummy_qwen2vl(tmp_path, "7b")
    with Engine.from_pretrained(path, load_format="dummy", max_model_len=8192) as engine:
        images = [picture(i, 448, 448) for i in range(4)]
        prompts = [as_prompt(f"<|im_start|>user\n{IMAGE}Question {i}", [images[i % 4]], []) for i in range(16)]
        params = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)
        outputs = engine.generate(prompts, params)
        stats = engine.stats()
        assert [len(o.token_ids) for o in outputs] == [32] * 16
        assert stats["encoded_items"] == 4
        assert stats["cached_tokens"] > 0
        assert stats["blocks"]["in_use"] == stats["blocks"]["pending"] == 0
        assert len(outputs[0].prompt_token_ids) > 256
        print(f"\nKV tokens: {stats['block_size'] * sum(stats['blocks'].values())}")
        assert stats["block_size"] * sum(stats["blocks"].values()) > 500_000


MANY = SamplingParams(max_tokens=120, temperature=0, ignore_eos=True)


def many_prompts() -> list[TextPrompt]:
    """Different lengths, some sharing a picture, so that batches grow, shrink and share prefixes."""
    shared = picture(7, 224, 224)
    texts = [TextPrompt(prompt=f"The quick brown fox number {i} " + "jumps " * i) for i in range(6)]
    return texts + [
        TextPrompt(prompt=f"<|im_start|>user\n{IMAGE}Question {i}", multi_modal_data={"image": shared})
        for i in range(6)
    ]


def test_overlap_and_graphs_change_no_token(tmp_path: Path) -> None:
    path = make_tiny_qwen2vl(tmp_path)
    found = {}
    for overlap in (False, True):
        for graphs in (False, True):
            kv = KvCacheConfig(num_blocks=1024)
            with Engine.from_pretrained(
                path, dtype="float32", kv_cache_config=kv, overlap=overlap, cuda_graphs=graphs, max_num_seqs=16
            ) as engine:
                cold = [o.token_ids for o in engine.generate(many_prompts(), MANY)]
                warm = [o.token_ids for o in engine.generate(many_prompts(), MANY)]
                assert engine.stats()["cached_tokens"] > 0
            found[overlap, graphs] = cold
            assert cold == warm
    assert all(tokens == found[False, False] for tokens in found.values())


def test_a_hundred_steps_never_wait_for_the_device(tmp_path: Path) -> None:
    path = make_tiny_qwen2vl(tmp_path)
    sampled = SamplingParams(max_tokens=120, temperature=0.8, top_p=0.9, seed=1, ignore_eos=True)
    penalised = SamplingParams(max_tokens=120, temperature=0, repetition_penalty=1.2, logprobs=2, ignore_eos=True)
    with Engine.from_pretrained(path, kv_cache_config=KvCacheConfig(num_blocks=1024), max_num_seqs=16) as engine:
        engine.generate(many_prompts(), MANY)  # what is built once may wait
        engine.generate(many_prompts()[:2], [sampled, penalised])
        before = engine.stats()["steps"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that it may miss some
            torch.cuda.set_sync_debug_mode("error")
        try:
            outputs = engine.generate(many_prompts(), [MANY] * 10 + [sampled, penalised])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert engine.stats()["steps"] - before >= 100
        assert all(len(o.token_ids) == 120 for o in outputs)
