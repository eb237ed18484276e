"""Bodies to SamplingParams: every field, its bounds, its types, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mm_core.errors import InvalidGrammarError, InvalidParamsError, MMError, NotFoundError
from mm_core.server.body import parse_model
from mm_core.server.config import MediaConfig, ServerConfig
from mm_core.server.context import ANYBODY, Call
from mm_core.server.failures import status_of
from mm_core.server.params import chat_params, check_model, check_processor_kwargs, completion_params, prompt_options
from mm_core.server.protocol.chat import ChatRequest
from mm_core.server.protocol.common import ReuseDict, TokenDetails, UsageDict
from mm_core.server.protocol.completions import DEFAULT_MAX_TOKENS, CompletionRequest

USER = [{"role": "user", "content": "hi"}]
CONFIG = ServerConfig()


def chat_body(**fields: Any) -> ChatRequest:
    return parse_model(json.dumps({"model": "m", "messages": USER, **fields}).encode(), ChatRequest)


def completion_body(**fields: Any) -> CompletionRequest:
    return parse_model(json.dumps({"model": "m", "prompt": "hi", **fields}).encode(), CompletionRequest)


def refusal(call: Any) -> MMError:
    with pytest.raises(MMError) as caught:
        call()
    assert status_of(caught.value) == 400
    return caught.value


# Fields that chat and completions have in common, with values that must not be taken.
BAD = [
    ("temperature", [-1, -0.001, 100.5, "1", True, [1]]),
    ("top_p", [0, -1, 2, "0.5", True]),
    ("top_k", [-2, 1e9, 2.5, 2**40, "3", True]),
    ("min_p", [2, -0.1, True]),
    ("max_tokens", [0, -1, 10**12, 1e12, "5", True, 3.0]),
    ("n", [0, -1, 10**6, 129, 1.0, "1", True]),
    ("best_of", [1, 2, [], "x"]),
    ("stop", [["a"] * 10**4, ["a"] * 17, "", [""], "x" * 2**20, [1], 1, True, [None], {"a": 1}]),
    ("seed", [-1, 2**63, 2**64, 1.5, True, "1"]),
    ("logit_bias", [
        {"-1": 1}, {"x": 1}, {"1": 1e9}, {"1": -101}, {"1": True}, {"1": "1"}, {"01": 1}, {"1.5": 1}, [1],
        {str(i): 1 for i in range(10**5)},
    ]),
    ("presence_penalty", [-2.1, 1e9, True]),
    ("frequency_penalty", [2.1, -1e9, "0"]),
    ("repetition_penalty", [0, -1, 1e9, True]),
    ("min_tokens", [-1, 1.0, True]),
    ("stop_token_ids", [[-1], [1.0], [True], ["1"], list(range(2000)), 5]),
    ("stream", [1, "true", []]),
    ("ignore_eos", [1, "yes"]),
    ("skip_special_tokens", [0]),
    ("cache_salt", ["", "a" * 129, "a b", "\u00e9", "a\x00", 1, "../x!"]),
    ("mm_processor_kwargs", [[], "x", 1]),
    ("user", [1, "x" * 513]),
    ("stream_options", [{"include_usage": 1}, {"more": True}, 1, {"include_usage": True}]),
    ("structured_outputs", [{"xml": "a"}, {"choice": []}, {"choice": [1]}, {"regex": 1}, {"json": 1}, 1]),
]  # fmt: skip


@pytest.mark.parametrize("make", [chat_body, completion_body])
@pytest.mark.parametrize(("field", "values"), BAD, ids=[field for field, _ in BAD])
def test_what_is_out_of_range_or_of_another_type_is_refused_by_name(make: Any, field: str, values: list[Any]) -> None:
    for value in values:
        error = refusal(lambda value=value: make(**{field: value}))
        assert field in (error.param or str(error)), (value, error)  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e400", "1" * 5000])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty", "seed"])
def test_numbers_that_are_none_are_refused(field: str, text: str) -> None:
    body = f'{{"model": "m", "prompt": "hi", "{field}": {text}}}'.encode()
    refusal(lambda: parse_model(body, CompletionRequest))


@pytest.mark.parametrize("make", [chat_body, completion_body])
@pytest.mark.parametrize("field", [field for field, _ in BAD])
def test_null_is_the_default(make: Any, field: str) -> None:
    to_params = chat_params if make is chat_body else completion_params
    assert to_params(make(**{field: None}), CONFIG) == to_params(make(), CONFIG)


def test_fields_arrive_under_the_engine_s_names() -> None:
    given = {
        "n": 3, "temperature": 1, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "presence_penalty": 1, "seed": 2**63 - 1,
        "frequency_penalty": -1.5, "repetition_penalty": 1.1, "stop_token_ids": [1, 2], "ignore_eos": True,
        "include_stop_str_in_output": True, "skip_special_tokens": False, "min_tokens": 2, "max_tokens": 9,
    }  # fmt: skip
    for params in (chat_params(chat_body(**given), CONFIG), completion_params(completion_body(**given), CONFIG)):
        for name, value in given.items():
            assert getattr(params, name) == (tuple(value) if isinstance(value, list) else value), name
    bias = chat_params(chat_body(logit_bias={"5": -100, "7": 3.5}), CONFIG).logit_bias
    assert dict(bias) == {5: -100.0, 7: 3.5}
    assert chat_params(chat_body(stop="a"), CONFIG).stop == ("a",)
    assert chat_params(chat_body(stop=["a", "b"]), CONFIG).stop == ("a", "b")
    assert chat_params(chat_body(stop=[]), CONFIG).stop == ()


def test_max_tokens_has_two_names_a_default_and_a_ceiling() -> None:
    capped = ServerConfig(max_completion_tokens=50)
    assert chat_params(chat_body(), CONFIG).max_tokens is None
    assert chat_params(chat_body(), capped).max_tokens == 50
    assert chat_params(chat_body(max_tokens=7), capped).max_tokens == 7
    assert chat_params(chat_body(max_completion_tokens=7), CONFIG).max_tokens == 7
    assert chat_params(chat_body(max_completion_tokens=7, max_tokens=7), CONFIG).max_tokens == 7
    assert completion_params(completion_body(), CONFIG).max_tokens == DEFAULT_MAX_TOKENS
    assert completion_params(completion_body(), ServerConfig(max_completion_tokens=3)).max_tokens == 3
    assert "max_tokens" in str(refusal(lambda: chat_body(max_completion_tokens=7, max_tokens=8)))
    for make, to_params in ((chat_body, chat_params), (completion_body, completion_params)):
        error = refusal(lambda make=make, to_params=to_params: to_params(make(max_tokens=51), capped))
        assert error.param == "max_tokens"  # type: ignore[attr-defined]
        error = refusal(lambda make=make, to_params=to_params: to_params(make(max_tokens=5, min_tokens=6), CONFIG))
        assert "min_tokens=6 is above max_tokens=5" in str(error)


def test_log_probabilities_are_asked_for_in_each_route_s_way() -> None:
    assert chat_params(chat_body(), CONFIG).logprobs is None
    assert chat_params(chat_body(logprobs=False), CONFIG).logprobs is None
    assert chat_params(chat_body(logprobs=True), CONFIG).logprobs == 0
    assert chat_params(chat_body(logprobs=True, top_logprobs=5), CONFIG).logprobs == 5
    assert completion_params(completion_body(logprobs=0), CONFIG).logprobs == 0
    for fields in ({"top_logprobs": 1}, {"top_logprobs": 0, "logprobs": False}, {"logprobs": 1}, {"logprobs": "1"}):
        refusal(lambda fields=fields: chat_body(**fields))
    for value in (-1, 10**6):
        refusal(lambda value=value: chat_body(logprobs=True, top_logprobs=value))
        refusal(lambda value=value: completion_body(logprobs=value))
    refusal(lambda: completion_body(logprobs=True))
    assert "echo" in str(refusal(lambda: completion_body(logprobs=1, echo=True)))


REFUSED = [
    ("tools", [{"type": "function"}], "Tools"), ("functions", [{"name": "f"}], "Tools"), ("function_call", "auto", ""),
    ("tool_choice", "auto", ""), ("audio", {"voice": "x"}, "audio"), ("modalities", ["audio"], ""),
    ("prediction", {"type": "content"}, ""), ("web_search_options", {}, ""), ("chat_template", "{{ x }}", "template"),
    ("chat_template_kwargs", {"tokenize": False}, "template"), ("add_generation_prompt", False, "template"),
    ("continue_final_message", True, "template"), ("best_of", 2, "n"), ("prompt_logprobs", 1, "no field"),
    ("guided_json", {}, "no field"), ("reasoning_effort", "low", "no field"), ("documents", [], "no field"),
    ("mm_hashes", ["a"], "no field"), ("prompt_embeds", "x", "no field"), ("priority", 1, "no field"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "told"), REFUSED, ids=[field for field, _, _ in REFUSED])
def test_what_the_server_cannot_do_is_refused_and_never_ignored(field: str, value: Any, told: str) -> None:
    error = refusal(lambda: chat_body(**{field: value}))
    assert (error.param or "").startswith(field)  # type: ignore[attr-defined]
    assert told.lower() in str(error).lower()


def test_what_does_not_change_an_answer_is_taken() -> None:
    chat_body(
        user="somebody", metadata={"a": "b"}, store=True, service_tier="auto", safety_identifier="x", tools=[],
        prompt_cache_key="k", parallel_tool_calls=False, tool_choice="none", modalities=["text"], functions=None,
        response_format={"type": "text"},
    )  # fmt: skip


MESSAGES: list[Any] = [
    [], None, "hi", [{}], [{"role": "user"}], [{"content": "x"}], [{"role": "root", "content": "x"}],
    [{"role": "user", "content": None}], [{"role": "user", "content": []}], [{"role": "user", "content": 5}],
    [{"role": "user", "content": ["x"]}], [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "text", "text": 1}]}],
    [{"role": "user", "content": [{"type": "text", "text": "x", "uuid": "a"}]}],
    [{"role": "user", "content": [{"type": "image"}]}],
    [{"role": "user", "content": [{"type": "nonsense", "nonsense": 1}]}],
    [{"role": "user", "content": [{"type": ["text"], "text": "x"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": "data:image/png;base64,AA=="}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": ["x"]}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": None}}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": ""}}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x", "detail": "high"}}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}, "video_url": {"url": "x"}}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x", "max_pixels": 1}}]}],
    [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    [{"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    [{"role": "tool", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
    [{"role": "user", "content": "x", "embeds": [1.0]}],
    [{"role": "user", "content": "x"}] * 5000,
]  # fmt: skip
UUIDS: list[Any] = ["", "a" * 129, "../x", "a\x00b", 5, ["a"], "a b", "ü"]


@pytest.mark.parametrize("messages", MESSAGES, ids=lambda messages: json.dumps(messages)[:60])
def test_messages_of_another_shape_are_refused(messages: Any) -> None:
    assert (refusal(lambda: chat_body(messages=messages)).param or "").startswith("messages")  # type: ignore[attr-defined]


@pytest.mark.parametrize("uuid", UUIDS, ids=repr)
def test_uuids_that_are_no_names_are_refused(uuid: Any) -> None:
    part = {"type": "image_url", "image_url": {"url": "x"}, "uuid": uuid}
    refusal(lambda: chat_body(messages=[{"role": "user", "content": [part]}]))
    refusal(lambda: completion_body(multi_modal_data={"image": "x"}, multi_modal_uuids={"image": [uuid]}))


def test_messages_reach_the_engine_with_role_and_content_alone() -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": "x", "detail": "auto"}, "uuid": "u"},
        {"type": "image_url", "image_url": None, "uuid": "u"},
        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
        {"type": "video_url", "video_url": {"url": "y"}},
    ]
    given = [
        {"role": "system", "content": "s"},
        {"role": "user", "name": "me", "content": parts},
        {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None},
        {"role": "tool", "content": "c", "tool_call_id": "1"},
    ]
    plain = [message.plain() for message in chat_body(messages=given).messages]
    assert plain == [{"role": message["role"], "content": message["content"]} for message in given]


def test_structured_output_of_every_spelling() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    found = chat_params(
        chat_body(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}), CONFIG
    ).structured
    assert found is not None
    assert json.loads(found.json_schema or "") == schema
    spellings: list[tuple[dict[str, Any], str, Any]] = [
        ({"response_format": {"type": "json_object"}}, "json_object", True),
        ({"response_format": {"type": "regex", "pattern": "a+"}}, "regex", "a+"),
        ({"response_format": {"type": "choice", "choices": ["a", "b"]}}, "choice", ("a", "b")),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a"]}}, "choice", ("a",)),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "grammar", 'start: "a"'),
    ]
    for fields, name, value in spellings:
        structured = chat_params(chat_body(**fields), CONFIG).structured
        assert getattr(structured, name) == value
    assert chat_params(chat_body(response_format={"type": "text"}), CONFIG).structured is None
    own = completion_params(completion_body(structured_outputs={"json": schema}), CONFIG).structured
    assert own is not None
    assert json.loads(own.json_schema or "") == schema


def test_structured_output_is_one_thing_at_a_time() -> None:
    both = {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}
    for fields in (both, {"structured_outputs": {"regex": "a", "choice": ["a"]}}, {"structured_outputs": {}}):
        with pytest.raises((InvalidParamsError, InvalidGrammarError)):
            chat_params(chat_body(**fields), CONFIG)
    for wrong in (
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "regex"},
        {"type": "choice", "choices": []},
        "text",
    ):
        refusal(lambda wrong=wrong: chat_body(response_format=wrong))


PROMPTS: list[Any] = [None, 5, True, [], [[]], [["a"]], [1, "a"], [True], [1.0], [-1], [2**31], [[1], "a"], ["a", 1],
                      {"a": 1}, ["a"] * 129]  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: repr(prompt)[:30])
def test_prompts_of_another_shape_are_refused(prompt: Any) -> None:
    assert (refusal(lambda: completion_body(prompt=prompt)).param or "").startswith("prompt")  # type: ignore[attr-defined]


def test_prompts_come_in_four_shapes() -> None:
    assert completion_body(prompt="a").prompts == ["a"]
    assert completion_body(prompt=["a", "b"]).prompts == ["a", "b"]
    assert completion_body(prompt=[1, 2]).prompts == [[1, 2]]
    assert completion_body(prompt=[[1], [2]]).prompts == [[1], [2]]
    assert "128" in str(refusal(lambda: completion_body(prompt=["a"] * 65, n=2)))
    assert "one prompt" in str(refusal(lambda: completion_body(prompt=["a", "b"], multi_modal_data={"image": "x"})))
    for field in ("suffix",):
        assert refusal(lambda field=field: completion_body(**{field: "x"})).param == field  # type: ignore[attr-defined]
    for data in ({"smell": "x"}, {"image": 5}, {"image": [5]}, {"image": ""}, {"image": {"pixels": []}}, []):
        refusal(lambda data=data: completion_body(multi_modal_data=data))


def test_processor_settings_stay_under_the_server_s_ceilings() -> None:
    media = MediaConfig(max_image_pixels=1000, max_video_frames=10)
    check_processor_kwargs({"max_pixels": 1000, "min_pixels": 5, "max_frames": 10, "fps": 2.0, "other": "x"}, media)
    for kwargs in (
        {"max_pixels": 1001}, {"min_pixels": 10**12}, {"max_frames": 11}, {"num_frames": 1e9}, {"min_frames": 11},
        {"max_pixels": float("nan")}, {"other": "x" * 5000},
    ):  # fmt: skip
        with pytest.raises(InvalidParamsError) as caught:
            check_processor_kwargs(kwargs, media)
        assert caught.value.param == "mm_processor_kwargs"


def test_the_model_has_one_name() -> None:
    context: Any = SimpleNamespace(model_name="own", config=CONFIG)
    check_model("own", context)
    with pytest.raises(NotFoundError) as caught:
        check_model("other", context)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert "other" not in str(caught.value)


def test_salts_are_of_the_caller_and_of_the_call() -> None:
    context: Any = SimpleNamespace(model_name="own", config=CONFIG)
    call = Call("/", ANYBODY)
    assert prompt_options(chat_body(), call, context) == {"mm_processor_kwargs": None, "cache_salt": None}
    one, two = (prompt_options(chat_body(cache_salt=salt), call, context)["cache_salt"] for salt in ("one", "two"))
    assert one not in (two, "one", None)


def test_every_field_is_documented() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/serving-chat.md").read_text(encoding="utf-8")
    for model in (ChatRequest, CompletionRequest):
        missing = [name for name in model.model_fields if f"`{name}`" not in page and f"`{name}:" not in page]
        assert missing == []
    for reply in (ReuseDict, UsageDict, TokenDetails):
        assert [n for n in reply.__annotations__ if n not in page and not n.endswith("_tokens")] == []
