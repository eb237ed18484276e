"""Detokenization, stop strings and request outputs against whole-text decoding."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mm_core.config import SamplingParams
from mm_core.engine.output import Detokenizer, RequestText, StopMatcher, WholeTexts
from mm_core.types import Logprob, PreparedRequest, RequestOutput, Usage

TEXT = "Hello, wörld! 你好世界 👩\u200d👩\u200d👧 é e\u0301 ñ 🇩🇪 한국어  two  spaces\n\tend 𝔘𝔫𝔦 �ok."
MERGES = [("h", "e"), ("l", "l"), ("Ġ", "t"), ("Ġ", "Ġ"), ("ä", "½"), ("½", "ł")]  # two split characters


def byte_level() -> Tokenizer:
    """All 256 bytes, a few merges (some with half a character), one special token."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in MERGES]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return tokenizer


def metaspace() -> Tokenizer:
    """As Llama's sentencepiece: '▁' for a space, dropped at the start, bytes for the unknown."""
    words = ["▁", "▁Hello", "▁w", "ld", "▁two", "▁spaces", "end", ",", "!", *"Helowrdtspacnk."]
    tokens = dict.fromkeys(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words])
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    strip = decoders.Strip(content=" ", left=1, right=0)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return tokenizer


BYTE_LEVEL = byte_level()
METASPACE = metaspace()
EOS = BYTE_LEVEL.token_to_id("<eos>")


def stream(tokenizer: Any, ids: Sequence[int], skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    return [*(detokenizer.append([token]) for token in ids), detokenizer.finish()]


def encode(text: str, tokenizer: Tokenizer = BYTE_LEVEL) -> list[int]:
    return list(tokenizer.encode(text).ids)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, METASPACE], ids=["byte_level", "metaspace"])
def test_pieces_are_whole_characters_and_add_up(tokenizer: Tokenizer) -> None:
    text = TEXT.replace("�", "")
    ids = encode(text, tokenizer)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert not any("�" in piece for piece in pieces)
    assert pieces[-1] == ""
    assert len(ids) > len(text)  # several tokens a character occurred
    assert sum(map(bool, pieces)) > len(text) // 2  # and text came as it was complete, not at the end


def test_a_real_replacement_character_is_text() -> None:
    assert "".join(stream(BYTE_LEVEL, encode(TEXT))) == TEXT


@settings(max_examples=250, deadline=None)
@given(st.lists(st.integers(0, EOS + 2), max_size=60), st.booleans())
def test_random_byte_tokens_add_up(ids: list[int], skip: bool) -> None:
    """Random tokens are mostly invalid UTF-8; ids beyond EOS are unknown to the tokenizer."""
    expected = BYTE_LEVEL.decode(ids, skip_special_tokens=skip)
    assert "".join(stream(BYTE_LEVEL, ids, skip)) == expected
    whole = Detokenizer(BYTE_LEVEL, skip_special_tokens=skip)
    assert whole.append(ids) + whole.finish() == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([*encode("é你👩�"), EOS]), max_size=120))
def test_broken_characters_add_up(ids: list[int]) -> None:
    assert "".join(stream(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="Helo wrd.é你👩", max_size=40), st.data())
def test_random_metaspace_text_adds_up(text: str, data: st.DataObject) -> None:
    ids = encode(text, METASPACE)
    for place in sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=8)), reverse=True):
        ids.insert(place, METASPACE.token_to_id("<eos>"))
    assert "".join(stream(METASPACE, ids)) == METASPACE.decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([i for t, i in METASPACE.get_vocab().items() if not t.startswith("<0x")])))
def test_random_metaspace_tokens_add_up(ids: list[int]) -> None:
    assert "".join(stream(METASPACE, ids)) == METASPACE.decode(ids)


def test_byte_fallback_shows_good_characters_before_a_bad_byte() -> None:
    ids = [*encode("a你", METASPACE), METASPACE.token_to_id("<0xFF>"), *encode("ld", METASPACE)[1:]]
    assert "".join(stream(METASPACE, ids)).startswith("a你�")


def test_transformers_tokenizer() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<eos>")
    assert "".join(stream(tokenizer, [*encode(TEXT), EOS])) == TEXT


class Counting:
    """Counts the tokens that are decoded."""

    def __init__(self) -> None:
        self.tokens = 0

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool) -> str:
        self.tokens += len(ids)
        return str(BYTE_LEVEL.decode(ids, skip_special_tokens=skip_special_tokens))


BAD_BYTE = encode("é")[1]


@pytest.mark.parametrize("bad", range(24))
def test_a_character_after_wrong_bytes_stays_whole(bad: int) -> None:
    ids = [*encode("a"), *[BAD_BYTE] * bad, *encode("👩 b")]
    assert "".join(stream(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids) == "a" + "�" * bad + "👩 b"


class Stripping:
    """Drops all white space at the start."""

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool) -> str:
        return str(BYTE_LEVEL.decode(ids, skip_special_tokens=skip_special_tokens)).lstrip()


def test_white_space_inside_survives_a_tokenizer_that_strips() -> None:
    text = "\n\na" + "\n" * 20 + " b" + " " * 9 + "c"
    assert "".join(stream(Stripping(), encode(text))) == text.lstrip()


@pytest.mark.parametrize("ids", [encode(TEXT) * 60, [EOS] * 5000, [BAD_BYTE] * 5000, [EOS + 5] * 5000])
def test_cost_is_linear(ids: list[int]) -> None:
    ids = ids[:5000]
    counting = Counting()
    started = time.perf_counter()
    text = "".join(stream(counting, ids))
    assert text == BYTE_LEVEL.decode(ids)
    assert counting.tokens < 20 * len(ids)
    assert time.perf_counter() - started < 5


# --- stop strings ---------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3), st.integers(1, 4))
def test_stop_matcher_against_find(text: str, stops: list[str], size: int) -> None:
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    matcher = StopMatcher(stops)
    for start in range(0, len(text), size):
        hit = matcher.feed(text[start : start + size])
        if hit is not None:
            assert (start + hit[1], -len(hit[0]), hit[0]) == min(found)
            return
        seen = text[: start + size]
        beginnings = [stop[:i] for stop in stops for i in range(1, len(stop))]
        assert matcher.pending == max((len(b) for b in beginnings if seen.endswith(b)), default=0)
    assert not found


def request(**params: Any) -> PreparedRequest:
    return PreparedRequest("r1", (1, 2, 3), SamplingParams(**params))


def text_of(**params: Any) -> RequestText:
    return RequestText(request(**params), BYTE_LEVEL, lambda text, ids: text)


def feed(answer: RequestText, ids: Sequence[int], step: int = 1) -> Iterator[tuple[str | None, RequestOutput]]:
    for start in range(0, len(ids), step):
        yield answer.update(0, ids[start : start + step], [], None, None), answer.output(Usage())


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.parametrize("include", [False, True])
def test_stop_string_across_tokens(step: int, include: bool) -> None:
    answer = text_of(stop=["你好", "nowhere"], include_stop_str_in_output=include)
    ids = encode("say 你 and 你好 more")
    results = list(feed(answer, ids, step))
    assert [stop for stop, _ in results if stop] == ["你好"]
    last = results[-1][1]
    assert last.text == "say 你 and " + "你好" * include
    assert (last.finish_reason, last.outputs[0].stop_reason, last.finished) == ("stop", "你好", True)
    assert list(last.token_ids) == encode("say 你 and 你好")
    assert last.usage.completion_tokens == len(last.token_ids)


@settings(max_examples=200, deadline=None)
@given(st.text("abé", max_size=25), st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=3))
def test_streamed_text_never_shows_part_of_the_stop(text: str, stops: list[str]) -> None:
    answer = text_of(stop=stops)
    shown = ""
    results = list(feed(answer, encode(text)))
    for _, output in results:
        assert output.text.startswith(shown)  # nothing is taken back
        assert not any(stop in output.text for stop in stops)
        shown = output.text
    if not any(stop for stop, _ in results):
        assert answer.update(0, [], [], "length", None) is None
        assert answer.output(Usage()).text == text


def test_text_that_looked_like_a_stop_comes_out_later() -> None:
    answer = text_of(stop="<end>")
    assert [output.text for _, output in feed(answer, encode("a<en<e."))][-3:] == ["a<en", "a<en", "a<en<e."]
    feeding = text_of(stop="<end>")
    assert [output.text for _, output in feed(feeding, encode("a<en"))] == ["a", "a", "a", "a"]
    assert feeding.update(0, [], [], "length", None) is None
    assert feeding.output(Usage()).text == "a<en"


def test_no_stop_string_before_min_tokens() -> None:
    answer = text_of(stop="xy", min_tokens=4)
    results = list(feed(answer, encode("xyxyzxy")))
    assert [stop for stop, _ in results] == [None] * 6 + ["xy"]
    assert results[-1][1].text == "xyxyz"


def test_only_a_token_that_ends_an_answer_is_hidden() -> None:
    running, long, cut = text_of(), text_of(), text_of(stop=["b"])
    running.update(0, encode("a"), [], None, None)
    long.update(0, encode("a"), [], "length", None)
    cut.update(0, [*encode("ab"), EOS], [], "stop", None)
    assert [each.output(Usage()).outputs[0].hidden_tokens for each in (running, long, cut)] == [0, 0, 0]


def test_stop_string_wins_over_a_later_finish() -> None:
    answer = text_of(stop="b")
    assert answer.update(0, [*encode("abc"), EOS], [], "stop", None) == "b"
    output = answer.output(Usage())
    assert (output.text, output.token_ids) == ("a", tuple(encode("ab")))
    assert answer.update(0, encode("zzz"), [], "length", None) is None  # too late: dropped
    assert answer.output(Usage()) == output


# --- outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(("last", "shown"), [(EOS, "<eos>"), (encode("b")[0], "b")])
def test_stop_token_stays_in_the_ids_but_not_in_the_text(last: int, shown: str, skip: bool) -> None:
    answer = text_of(stop_token_ids=[last], skip_special_tokens=skip)
    assert answer.update(0, [*encode("a"), last], [], "stop", last) is None
    output = answer.output(Usage())
    assert (output.text, output.token_ids) == ("a", (*encode("a"), last))
    assert (output.finish_reason, output.outputs[0].stop_reason, output.outputs[0].hidden_tokens) == ("stop", last, 1)
    included = text_of(stop_token_ids=[last], skip_special_tokens=False, include_stop_str_in_output=True)
    included.update(0, [*encode("a"), last], [], "stop", last)
    assert included.output(Usage()).text == "a" + shown
    assert included.output(Usage()).outputs[0].hidden_tokens == 0


@pytest.mark.parametrize("reason", ["length", "abort"])
def test_finish_shows_half_a_character_and_calls_the_hook_once(reason: str) -> None:
    calls: list[Sequence[int]] = []

    def hook(text: str, ids: Sequence[int]) -> str:
        calls.append(tuple(ids))
        return text + "|"

    answer = RequestText(request(), BYTE_LEVEL, hook)
    ids = encode("a你")[:-1]
    answer.update(0, ids, [], None, None)
    assert answer.output(Usage()).text == "a"
    answer.update(0, [], [], reason, None)
    repaired = reason == "length"
    assert answer.output(Usage()).text == "a�" + "|" * repaired
    assert calls == [tuple(ids)] * repaired


def test_answers_are_independent() -> None:
    answer = text_of(n=2, stop="c")
    answer.update(0, encode("a"), [], None, None)
    answer.update(1, encode("bc"), [], None, None)
    output = answer.output(Usage(prompt_tokens=3, cached_tokens=2))
    assert [(o.index, o.text, o.finish_reason) for o in output.outputs] == [(0, "a", None), (1, "b", "stop")]
    assert not output.finished
    assert output.usage == Usage(prompt_tokens=3, cached_tokens=2, completion_tokens=3)
    answer.update(0, [], [], "length", None)
    done = answer.output(Usage())
    assert done.finished
    assert (done.request_id, done.prompt_token_ids) == ("r1", (1, 2, 3))


def test_logprobs_are_decoded_and_summed() -> None:
    a, b = encode("ab")
    table: Mapping[int, Logprob] = {a: Logprob(-0.5, 1), EOS: Logprob(-1.5, 2)}
    answer = text_of(logprobs=1)
    answer.update(0, [a], [table], None, None)
    answer.update(0, [EOS], [table], None, None)
    answer.update(0, [b], [None], None, None)  # nothing known of this one
    output = answer.output(Usage()).outputs[0]
    decoded = {a: Logprob(-0.5, 1, "a"), EOS: Logprob(-1.5, 2, "<eos>")}
    assert output.logprobs == (decoded, decoded, {})
    assert output.cumulative_logprob == -2.0
    without = text_of()
    without.update(0, [a], [], None, None)
    assert without.output(Usage()).outputs[0].logprobs is None
    assert without.output(Usage()).outputs[0].cumulative_logprob is None


# --- text that nobody waits for -------------------------------------------------------------------


def at_end(tokenizer: Any = BYTE_LEVEL, **params: Any) -> RequestText:
    return RequestText(request(**params), tokenizer, lambda text, ids: text + "|", stream=False)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, EOS + 2), min_size=1, max_size=40), st.booleans(), st.booleans(), st.booleans())
def test_text_decoded_at_the_end_is_the_streamed_one(ids: list[int], skip: bool, include: bool, stops: bool) -> None:
    params = {"skip_special_tokens": skip, "include_stop_str_in_output": include}
    streamed = RequestText(request(**params), BYTE_LEVEL, lambda text, ids: text + "|")
    late, whole = at_end(**params), at_end(**params)
    assert late.plain
    assert not streamed.plain
    end, stop = ("stop", 7) if stops else ("length", None)
    for token in ids[:-1]:
        streamed.update(0, [token], [], None, None)
        late.append(0, token)
    for token in ids:
        whole.append(0, token)
    for text in (streamed, late):
        assert text.update(0, ids[-1:], [], end, stop) is None
    whole.end(0, BYTE_LEVEL.decode(whole.shown(0, end), skip_special_tokens=skip), end, stop)
    assert late.output(Usage()) == streamed.output(Usage()) == whole.output(Usage())


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="Helo wrd.é你👩", min_size=1, max_size=40))
def test_text_decoded_at_the_end_with_dropped_spaces(text: str) -> None:
    late, ids = at_end(METASPACE), encode(text, METASPACE)
    late.update(0, ids, [], "length", None)
    assert late.output(Usage()).text == "".join(stream(METASPACE, ids)) + "|"


@pytest.mark.parametrize("skip", [True, False])
def test_answers_decoded_together_are_those_decoded_alone(skip: bool) -> None:
    transformers = pytest.importorskip("transformers")

    class Shouting(transformers.PreTrainedTokenizerFast):  # type: ignore[misc, name-defined]
        def _decode(self, *args: Any, **kwargs: Any) -> str:
            return str(super()._decode(*args, **kwargs)).upper()

    answers = [[*encode(text), EOS] for text in (TEXT, "", "a b", "你", "x" * 50)]
    options = {"tokenizer_object": byte_level(), "eos_token": "<eos>", "clean_up_tokenization_spaces": False}
    for make in (transformers.PreTrainedTokenizerFast, Shouting):
        tokenizer = make(**options)
        wanted = [tokenizer.decode(ids, skip_special_tokens=skip) for ids in answers]
        together = WholeTexts(tokenizer)
        assert (together._backend is None) == (make is Shouting)
        assert together.decode(answers, skip_special_tokens=skip) == wanted
        assert together.decode(answers[:1], skip_special_tokens=skip) == wanted[:1]


def test_stop_strings_and_logprobs_need_every_token() -> None:
    assert not at_end(stop="b").plain
    assert at_end(stop="b").update(0, encode("abc"), [], None, None) == "b"
    table = {encode("a")[0]: Logprob(-0.5, 1)}
    counted = at_end(logprobs=0)
    assert not counted.plain
    counted.update(0, encode("a"), [table], None, None)
    counted.update(0, encode("a"), [table], "length", None)
    output = counted.output(Usage()).outputs[0]
    assert (output.text, output.cumulative_logprob, len(output.logprobs or ())) == ("aa|", -1.0, 2)


def test_answers_that_end_apart_are_decoded_apart() -> None:
    late = at_end(n=2)
    late.append(0, encode("a")[0])
    late.update(1, encode("b"), [], "length", None)
    late.update(0, [], [], "abort", None)
    assert [o.text for o in late.output(Usage()).outputs] == ["a", "b|"]


def test_long_answer_is_fast() -> None:
    answer = text_of(stop=["x" * 1024, "<|never|>"])
    started = time.perf_counter()
    for token in encode("x" * 5000):
        if answer.update(0, [token], [], None, None):
            break
    assert time.perf_counter() - started < 5
    assert len(answer.output(Usage()).token_ids) == 1024


def test_output_does_not_import_torch() -> None:
    code = "import sys, mm_core.engine.output; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
