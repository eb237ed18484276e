"""Prompts, sampling options, checkpoints and plugins that cannot be served (rows P, S, C and G)."""

from __future__ import annotations

import json
import shutil
import struct
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.e2e import GREEDY, IMAGE, Canary, ask, check_message, settle, turn
from support.pictures import frames, picture
from support.tiny import make_tiny_qwen2vl

from mm_core import Engine, KvCacheConfig, SamplingParams, TextPrompt
from mm_core.errors import (
    BatchError,
    CheckpointError,
    EngineError,
    InvalidParamsError,
    MMError,
    PluginError,
    UnsupportedModelError,
)

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def canary(engine: Engine) -> Canary:
    return Canary(engine)


def refuse(engine: Engine, canary: Canary, prompt: Any, code: str, params: SamplingParams = GREEDY) -> MMError:
    with pytest.raises(MMError) as caught:
        engine.generate(prompt, params)
    assert caught.value.code == code, f"{caught.value.code}: {caught.value}"
    check_message(caught.value)
    canary.check()
    return caught.value


def pads(engine: Engine) -> tuple[int, int]:
    processor = engine._frontend.model.processor
    return processor.placeholder_id("image"), processor.placeholder_id("video")


# -- prompts ---------------------------------------------------------------------------------------

ONE = {"image": [picture(1)]}
BAD_PROMPTS: dict[str, tuple[Any, str]] = {
    "P1 a typed placeholder": (f"a {IMAGE} b", "media_placeholder_mismatch"),
    "P1 a typed video placeholder": ("a <|video_pad|> b", "media_placeholder_mismatch"),
    "P3 more placeholders": (
        TextPrompt(prompt=turn(IMAGE * 2), multi_modal_data=ONE), "media_placeholder_mismatch"),
    "P3 fewer placeholders": (
        TextPrompt(prompt=turn(IMAGE), multi_modal_data={"image": [picture(1)] * 2}), "media_placeholder_mismatch"),
    "P3 of another kind": (
        TextPrompt(prompt=turn(IMAGE), multi_modal_data={"video": (frames(1, 2), 2.0)}), "media_placeholder_mismatch"),
    "P5 negative": (TextPrompt(prompt_token_ids=[1, -1]), "invalid_prompt"),
    "P5 beyond the logits": (TextPrompt(prompt_token_ids=[1, 416]), "invalid_prompt"),
    "P5 far beyond": (TextPrompt(prompt_token_ids=[2**63]), "invalid_prompt"),
    "P5 float": (TextPrompt(prompt_token_ids=[1.0]), "invalid_prompt"),
    "P5 bool": (TextPrompt(prompt_token_ids=[True]), "invalid_prompt"),
    "P5 nested": (TextPrompt(prompt_token_ids=[[1]]), "invalid_prompt"),
    "P5 text": (TextPrompt(prompt_token_ids="123"), "invalid_prompt"),
    "P6 empty": ("", "invalid_prompt"),
    "P6 no ids": (TextPrompt(prompt_token_ids=[]), "invalid_prompt"),
    "P8 lone surrogate": ("a \ud800 b", "invalid_unicode"),
    "P8 lone low surrogate": (ask(picture(1), "\udfff"), "invalid_unicode"),
    "P9 a million combining marks": ("e" + "\u0301" * 10**6, "context_length_exceeded"),
    "P10 too many words": ("cat " * 4000, "context_length_exceeded"),
    "P11 10 MB of one letter": ("a" * 10_000_000, "context_length_exceeded"),
    "P11 10 MB of spaces": (" " * 10_000_000, "context_length_exceeded"),
    "P13 chat_template_kwargs": ({"prompt": "x", "chat_template_kwargs": {}}, "invalid_prompt"),
}  # fmt: skip


@pytest.mark.parametrize("row", BAD_PROMPTS)
def test_bad_prompts(engine: Engine, canary: Canary, row: str) -> None:
    prompt, code = BAD_PROMPTS[row]
    started = time.perf_counter()
    with pytest.raises(MMError):
        engine.generate(prompt, GREEDY)
    assert time.perf_counter() - started < 1
    refuse(engine, canary, prompt, code)


def test_p4_placeholders_among_token_ids(engine: Engine, canary: Canary) -> None:
    image, video = pads(engine)
    for ids in ([1, image, 2], [1, video, 2], [image] * 12):
        refuse(engine, canary, TextPrompt(prompt_token_ids=ids), "media_placeholder_mismatch")
    twice = TextPrompt(prompt_token_ids=[1, image, image], multi_modal_data=ONE)
    refuse(engine, canary, twice, "media_placeholder_mismatch")
    once = TextPrompt(prompt_token_ids=[1, image, 2], multi_modal_data=ONE)
    assert engine.generate(once, GREEDY)[0].prompt_token_ids == (1, *[image] * 12, 2)


def test_p8_lone_surrogates_in_messages(engine: Engine, canary: Canary) -> None:
    for role in ("system", "user", "assistant"):
        with pytest.raises(MMError) as caught:
            engine.chat([{"role": role, "content": "\ud800"}, {"role": "user", "content": "x"}], GREEDY)
        assert caught.value.code == "invalid_unicode"
        check_message(caught.value)
    canary.check()


def test_p9_odd_text_is_just_text(engine: Engine, canary: Canary) -> None:
    for text in ("a\0b", "\ufeffcat", "\u202ecat\u202c", "e" + "\u0301" * 500, "👩‍👩‍👧‍👦", " ", "\n", "﷽" * 100):
        output = engine.generate(text, GREEDY)[0]
        shown = engine._frontend.model.processor.tokenizer.decode(output.prompt_token_ids)
        assert shown == unicodedata.normalize("NFC", text)
    canary.check()


@pytest.mark.parametrize("media", [0, 1, 3])
def test_p10_the_last_prompt_that_fits(engine: Engine, canary: Canary, media: int) -> None:
    """max_model_len - 1 tokens, media included, leave room for one; there is no silent truncation."""
    limit = engine._frontend.max_model_len
    image, _ = pads(engine)
    filler = [3 + i % 250 for i in range(limit - 1 - 12 * media)]
    data = {"multi_modal_data": {"image": [picture(1)] * media}} if media else {}
    fits = TextPrompt(prompt_token_ids=[*filler, *[image] * media], **data)
    output = engine.generate(fits, GREEDY)[0]
    assert output.usage.prompt_tokens == limit - 1
    assert (len(output.token_ids), output.finish_reason) == (1, "length")
    over = TextPrompt(prompt_token_ids=[*filler, 5, *[image] * media], **data)
    error = refuse(engine, canary, over, "context_length_exceeded")
    assert f"{limit} tokens" in str(error)
    assert str(limit) in str(error)


def test_p5_an_id_without_a_spelling_is_harmless(engine: Engine, canary: Canary) -> None:
    """Logits are wider than the tokenizer (padded to a multiple of 16): such rows exist, and can be generated."""
    tokenizer, width = engine._frontend.model.processor.tokenizer, engine._frontend.model.decoder.vocab_size
    assert len(tokenizer) < width
    forced = engine.generate("The cat", SamplingParams(max_tokens=3, logit_bias={width - 1: 100.0}))[0]
    assert forced.token_ids == (width - 1,) * 3
    assert forced.text == ""
    assert engine.generate(TextPrompt(prompt_token_ids=[width - 1]), GREEDY)[0].finished
    canary.check()


# -- sampling --------------------------------------------------------------------------------------

BAD_PARAMS: list[dict[str, Any]] = [
    *({"temperature": v} for v in (NAN, INF, -INF, -1.0, 1e400, 101.0, "1", True, None)),
    *({"top_p": v} for v in (0, -1, 2, NAN, "0.5")), *({"top_k": v} for v in (-2, 1e9, 2.5, 10**12, True, "5")),
    *({"min_p": v} for v in (2.0, -0.1, NAN)),
    *({"max_tokens": v} for v in (0, -1, 10**12, 1e12, "5", True, 2.0)),
    *({"min_tokens": v} for v in (-1, 1.5, True, None)), {"min_tokens": 9, "max_tokens": 8},
    *({"n": v} for v in (0, -1, 10**6, 129, "2", True, None)), {"best_of": 3},
    *({"logprobs": v} for v in (-1, 10**6, 65, 1.0, True)), {"top_logprobs": 3},
    *({"stop": v} for v in (["x"] * 10**4, [f"s{i}" for i in range(17)], "", [""], "x" * 2**20, [1], 5, {}, b"x")),
    *({"stop_token_ids": v} for v in (["1"], [1.0], 5, [True], "12")),
    *({"seed": v} for v in (-1, 2**63, 2**64, 1.5, True, "1")),
    *({"logit_bias": v} for v in ({1: NAN}, {1: 1e9}, {1: -INF}, {1: "x"}, {1.5: 1.0}, {"x": 1.0}, {"-1x": 1.0}, [1])),
    {"logit_bias": dict.fromkeys(range(10**5), 1.0)},
    *({name: v} for name in ("presence_penalty", "frequency_penalty") for v in (NAN, 1e9, -1e9, -2.1, "1")),
    *({"repetition_penalty": v} for v in (0, -1.0, NAN, INF, 1e9)),
    *({n: v} for n in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output") for v in (1, "x", None)),
]  # fmt: skip


@pytest.mark.parametrize("options", BAD_PARAMS, ids=lambda o: repr(o)[:50])
def test_bad_sampling_options(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        SamplingParams(**options)
    assert caught.value.code == "invalid_params"
    assert any(name in str(caught.value) for name in options)
    check_message(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"logit_bias": {416: 1.0}}, {"logit_bias": {-1: 1.0}}, {"logit_bias": {2**40: 1.0}}, {"stop_token_ids": [416]},
     {"stop_token_ids": [-1]}, {"stop_token_ids": [2**63]}],
)  # fmt: skip
def test_s9_token_ids_outside_the_logits(engine: Engine, canary: Canary, options: dict[str, Any]) -> None:
    """Only the engine knows how wide they are; the victim in the same batch keeps its tokens."""
    params = SamplingParams(**options)
    error = refuse(engine, canary, "The cat", "invalid_params", params)
    assert "0 to 415" in str(error)
    with pytest.raises(BatchError) as caught:
        engine.generate([canary.prompt, "The cat"], [GREEDY, params])
    victim = caught.value.outputs[0]
    assert victim is not None
    assert victim.token_ids == canary.wanted


@pytest.mark.parametrize(
    "options",
    [{"temperature": 1e-9}, {"temperature": 5e-324}, {"temperature": 100.0}, {"top_p": 1e-9}, {"top_k": 10**9},
     {"top_k": -1}, {"min_p": 1.0}, {"seed": 0}, {"seed": 2**63 - 1}, {"repetition_penalty": 10.0},
     {"max_tokens": 2**31}, {"repetition_penalty": 1e-6}, {"presence_penalty": -2.0, "frequency_penalty": 2.0},
     {"logprobs": 64}, {"n": 128}, {"stop": [f"stop {i}" for i in range(16)]}, {"stop": "x" * 1024},
     {"logit_bias": dict.fromkeys(range(416), 100.0)}],
    ids=lambda o: repr(o)[:40],
)  # fmt: skip
def test_extreme_but_valid_options(engine: Engine, canary: Canary, options: dict[str, Any]) -> None:
    given = {"max_tokens": 4, **options}
    if given["max_tokens"] > 4:
        given["stop_token_ids"] = list(range(416))
    victim, odd = engine.generate([canary.prompt, "The cat"], [GREEDY, SamplingParams(**given)])
    assert victim.token_ids == canary.wanted
    assert all(1 <= len(o.token_ids) <= 4 for o in odd.outputs)
    canary.check()


def test_s2_a_temperature_near_zero_is_greedy(engine: Engine) -> None:
    greedy = engine.generate("The quick brown fox", SamplingParams(max_tokens=12, temperature=0))[0]
    tiny = engine.generate("The quick brown fox", SamplingParams(max_tokens=12, temperature=1e-9, seed=0))[0]
    assert tiny.token_ids == greedy.token_ids


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.fixture
def copy(tiny_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_path, tmp_path / "copy"))


def load(path: Path) -> Engine:
    return Engine.from_pretrained(path, kv_cache_config=KvCacheConfig(num_blocks=64), show_progress=False)


def edit(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def test_unknown_architecture_names_it_and_what_is_installed(copy: Path) -> None:
    edit(copy, architectures=["MambaForCausalLM"])
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM") as caught:
        load(copy)
    assert caught.value.code == "unsupported_model"
    assert "qwen2vl" in str(caught.value)
    check_message(caught.value)


def break_shard(path: Path) -> str:
    missing = sorted(path.glob("model-*.safetensors"))[1]
    missing.unlink()
    return missing.name


def truncate(path: Path) -> str:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return file.name


def huge_header(path: Path) -> str:
    file = path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**40) + file.read_bytes()[8:])
    return file.name


def only_pickle(path: Path) -> str:
    (path / "model.safetensors").unlink()
    torch.save({}, path / "pytorch_model.bin")
    return "safetensors"


def drop_tensor(path: Path) -> str:
    file = path / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("mlp.up_proj.weight"))
    del tensors[name]
    save_file(tensors, file)
    return "layers.0.mlp"


def nan_weights(path: Path) -> str:
    file = path / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("down_proj.weight"))
    tensors[name][0, 0] = NAN
    save_file(tensors, file)
    return name


def wrong_shape(path: Path) -> str:
    file = path / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("o_proj.weight"))
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, file)
    return name


def no_config(path: Path) -> str:
    (path / "config.json").unlink()
    return "config.json"


DAMAGES = [truncate, huge_header, only_pickle, drop_tensor, nan_weights, wrong_shape, no_config]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused(copy: Path, damage: Any) -> None:
    told = damage(copy)
    with pytest.raises(CheckpointError) as caught:
        load(copy)
    assert caught.value.code == "invalid_checkpoint"
    assert told in str(caught.value)
    check_message(caught.value)


def test_c1_missing_shard(tmp_path: Path) -> None:
    path = make_tiny_qwen2vl(tmp_path, shards=2)
    name = break_shard(path)
    with pytest.raises(CheckpointError, match=name) as caught:
        load(path)
    check_message(caught.value)


def test_c7_code_in_a_checkpoint_is_not_run(copy: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (copy / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Evil: pass\n")
    names = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoProcessor": "evil.Evil",
             "AutoTokenizer": ["evil.Evil", "evil.Evil"]}  # fmt: skip
    edit(copy, auto_map=names)
    for file in ("tokenizer_config.json", "preprocessor_config.json"):
        settings = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps({**settings, "auto_map": names}))
    with load(copy) as engine:
        assert engine.generate("The cat", GREEDY)[0].finished
    assert not ran.exists()


def test_c5_nan_logits_fail_the_request_by_name(tiny_path: Path) -> None:
    """Weights that are fine when loaded may still overflow."""
    with load(tiny_path) as engine:
        wanted = engine.generate("The cat", GREEDY)[0].token_ids
        norm = engine._frontend.model.decoder.get_parameter("norm.weight")
        kept = norm.clone()
        for _ in range(2):
            norm.fill_(NAN)
            with pytest.raises(EngineError, match="NaN") as caught:
                engine.generate("The cat", GREEDY)
            assert caught.value.code == "engine_error"
            check_message(caught.value)
            settle(engine)
            norm.copy_(kept)
            engine.clear_cache()
            assert engine.generate("The cat", GREEDY)[0].token_ids == wanted


# -- plugins ---------------------------------------------------------------------------------------


def fault(*_: Any, **__: Any) -> Any:
    raise RuntimeError("at 0x7fdeadbeef in /secret/plugin.py")


@pytest.mark.parametrize("hook", ["prepare", "expand", "variant", "apply_chat_template"])
def test_g5_a_hook_that_raises_is_named_and_not_quoted(
    engine: Engine, canary: Canary, monkeypatch: pytest.MonkeyPatch, hook: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine._frontend.model.processor, hook, fault)
        with pytest.raises(PluginError, match=f"'qwen2vl'.*{hook}") as caught:
            engine.chat([{"role": "user", "content": [{"type": "image", "image": picture(60)}]}], GREEDY)
    assert caught.value.code == "plugin_error"
    check_message(caught.value)
    canary.check()


def test_g5_an_encoder_that_raises_ends_its_request_only(
    engine: Engine, canary: Canary, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = ask(picture(61))
    engine.generate(canary.prompt, GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(engine._frontend.model.encoder, "forward", fault)
        steps = engine.stats()["steps"]
        with pytest.raises(BatchError) as caught:
            engine.generate([fresh, canary.prompt, fresh, "The cat"], GREEDY)
    assert engine.stats()["steps"] - steps < 3 * 8, "the requests did not share steps"
    outputs, errors = caught.value.outputs, caught.value.errors
    assert [o is not None for o in outputs] == [False, True, False, True]
    assert outputs[1].token_ids == canary.wanted
    assert {e.code for e in errors.values()} == {"plugin_error"}
    for error in errors.values():
        assert "'qwen2vl'" in str(error)
        check_message(error)
    canary.check()
    assert engine.generate(fresh, GREEDY)[0].usage.encoded_media_tokens == 12, "the failed item is not kept"
