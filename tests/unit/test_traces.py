"""Traces: the reader takes what the writer writes and nothing else; made-up ones are what they say, and repeatable."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from mm_core.bench import traces
from mm_core.bench.sim_requests import RequestMaker, text_ids
from mm_core.bench.trace_kinds import KINDS, TraceOptions, make_trace
from mm_core.bench.traces import Media, Text, Trace, TraceRequest, read_trace, write_trace
from mm_core.errors import ConfigError, DatasetError
from mm_core.hashing import get_hasher
from mm_core.scheduler.sequence import Sequence

HEADER = {"format": "mm-trace", "version": 1, "kind": "own", "seed": 3}
REQUEST = {
    "at": 0.5,
    "segments": [{"text": 1, "tokens": 4}, {"media": "m", "rows": 8, "cost": 32, "kind": "video"}],
    "answer": {"text": 2, "tokens": 3},
}
SMALL = TraceOptions(requests=40, media=5, rows=8, text_tokens=5, output_tokens=4, systems=3, system_tokens=30, turns=4)


def write(path, *entries):
    path.write_text("\n".join(e if isinstance(e, str) else json.dumps(e) for e in entries) + "\n", encoding="utf-8")
    return path


def item(**changes):
    return {**REQUEST, "segments": [{"media": "m", "rows": 8, "cost": 32, "kind": "image", **changes}]}


def text(**changes):
    return {**REQUEST, "segments": [{"text": 1, "tokens": 4, **changes}]}


# -- the file --------------------------------------------------------------------------------


def test_reads_what_it_says(tmp_path):
    turns = [{**REQUEST, "salt": "s", "conversation": "c", "turn": n, "think": n * 1.5} for n in range(2)]
    trace = read_trace(write(tmp_path / "t", HEADER, "", *turns, REQUEST))
    first = TraceRequest(0.5, (Text(1, 4), Media("m", 8, 32, "video")), Text(2, 3), "s", "c", 0, 0.0)
    second, third = replace(first, turn=1, think=1.5), replace(first, salt=None, conversation=None)
    assert trace == Trace((first, second, third), "own", 3)
    assert (first.prompt_tokens, first.media_rows) == (12, 8)
    assert trace.media == {"m": Media("m", 8, 32, "video")}


@pytest.mark.parametrize("kind", KINDS)
def test_made_up_traces_survive_the_file(kind, tmp_path):
    trace = make_trace(kind, replace(SMALL, salts=3))
    write_trace(trace, tmp_path / "t")
    assert read_trace(tmp_path / "t") == trace
    assert len(trace.requests) == 40
    assert trace == make_trace(kind, replace(SMALL, salts=3))
    assert trace != make_trace(kind, replace(SMALL, salts=3, seed=1))


BAD_HEADERS = [
    "", "null", "[]", "{}", '{"format": "mm-trace"}', json.dumps({**HEADER, "version": 2}),
    json.dumps({**HEADER, "version": True}), json.dumps({**HEADER, "more": 1}), json.dumps({**HEADER, "seed": -1}),
    json.dumps({**HEADER, "kind": ""}), json.dumps(REQUEST),
]  # fmt: skip


@pytest.mark.parametrize("header", BAD_HEADERS)
def test_bad_headers_are_refused(header, tmp_path):
    with pytest.raises(DatasetError, match=r"line 1|is empty"):
        read_trace(write(tmp_path / "t", header, REQUEST) if header else write(tmp_path / "t", ""))


BAD_REQUESTS = [
    "{", "no json", "NaN", "3", "[" * 5000 + "]" * 5000, '{"at": 1, "at": 2}',
    {**REQUEST, "more": 1}, {k: v for k, v in REQUEST.items() if k != "at"},
    *({**REQUEST, "at": at} for at in (-1, "0", True, None, 1e10)),
    '{"at": NaN, "segments": [{"text": 1, "tokens": 1}], "answer": {"text": 1, "tokens": 1}}',
    '{"at": 1e999, "segments": [{"text": 1, "tokens": 1}], "answer": {"text": 1, "tokens": 1}}',
    '{"at": 0, "segments": [{"text": 1, "tokens": ' + "9" * 5000 + '}], "answer": {"text": 1, "tokens": 1}}',
    *({**REQUEST, "segments": s} for s in ([], {}, None, [3], [{}], [REQUEST["segments"][0]] * 5000)),
    text(tokens=0), text(tokens=1.0), text(tokens=2**20 + 1), text(tokens=True), text(text=-1), text(text=2**63),
    text(text="a"), text(rows=2), text(media="m"),
    item(rows=0), item(rows=2**30), item(cost=-1), item(cost=1.5), item(kind="smell"), item(kind=["image"]),
    item(media=""), item(media=7), item(media=None), item(media="x" * 1000), item(tokens=3),
    {**REQUEST, "segments": [{"text": 1, "tokens": 2**20}, {"text": 1, "tokens": 2**20}]},
    *({**REQUEST, "answer": a} for a in (None, [], {}, {"text": 1}, {"text": 1, "tokens": 0}, {"tokens": 1})),
    {**REQUEST, "turn": 1}, {**REQUEST, "conversation": "c", "turn": 1}, {**REQUEST, "conversation": 3},
    {**REQUEST, "salt": ""}, {**REQUEST, "think": -1},
]  # fmt: skip


@pytest.mark.parametrize("request_", BAD_REQUESTS, ids=range(len(BAD_REQUESTS)))
def test_bad_requests_are_refused_with_their_line(request_, tmp_path):
    path = write(tmp_path / "t", HEADER, REQUEST, request_)
    with pytest.raises(DatasetError, match="line 3: ") as caught:
        read_trace(path)
    assert len(str(caught.value)) < 500 + len(str(path))


def test_items_and_turns_agree_with_earlier_lines(tmp_path):
    with pytest.raises(DatasetError, match="line 3: item 'm' was described otherwise"):
        read_trace(write(tmp_path / "t", HEADER, item(), item(rows=9)))
    talk = {**REQUEST, "conversation": "c"}
    with pytest.raises(DatasetError, match="line 3: `turn` is 0, but 1 is the next"):
        read_trace(write(tmp_path / "t", HEADER, talk, talk))


def test_files_that_are_no_traces(tmp_path, monkeypatch):
    with pytest.raises(DatasetError, match="cannot be read"):
        read_trace(tmp_path / "absent")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match="cannot be read"):
        read_trace(tmp_path / "binary")
    with pytest.raises(DatasetError, match="nothing to replay"):
        read_trace(write(tmp_path / "t", HEADER))
    with pytest.raises(DatasetError, match="cannot be written"):
        write_trace(make_trace("zipf", SMALL), tmp_path / "absent" / "t")
    with pytest.raises(DatasetError, match="line 1: it is longer than"):
        read_trace(write(tmp_path / "t", " " * (traces.MAX_LINE + 1)))
    monkeypatch.setattr(traces, "MAX_REQUESTS", 2)
    with pytest.raises(DatasetError, match="line 4: a trace has at most 2"):
        read_trace(write(tmp_path / "t", HEADER, REQUEST, REQUEST, REQUEST))


# -- what is made up -------------------------------------------------------------------------


def test_zipf_shares():
    trace = make_trace("zipf", TraceOptions(requests=20_000, media=50, rows=2, exponent=1.0, rate=100.0))
    counts = Counter(s.name for r in trace.requests for s in r.segments if isinstance(s, Media))
    total = sum(1 / k for k in range(1, 51))
    for rank in (0, 1, 9, 49):
        assert counts[f"m{rank}"] == pytest.approx(20_000 / (rank + 1) / total, rel=0.2)
    assert trace.requests[-1].at == pytest.approx(200, rel=0.05)
    flat = make_trace("zipf", TraceOptions(requests=5000, media=50, rows=2, exponent=0.0))
    counts = Counter(s.name for r in flat.requests for s in r.segments if isinstance(s, Media))
    assert min(counts.values()) > 50


def test_all_at_once():
    assert {r.at for kind in KINDS for r in make_trace(kind, replace(SMALL, rate=0.0)).requests} == {0.0}


def test_each_turn_repeats_the_conversation():
    last: dict[str, TraceRequest] = {}
    for request in make_trace("chat", SMALL).requests:
        name = request.conversation
        assert name is not None
        if request.turn:
            before = last[name]
            assert request.segments[: len(before.segments) + 1] == (*before.segments, before.answer)
            assert request.turn == before.turn + 1
        last[name] = request
    assert max(r.turn for r in last.values()) > 1
    assert len({s for r in last.values() for s in r.segments if isinstance(s, Media)}) == len(last)


def test_system_prompts_are_shared():
    trace = make_trace("system-prompts", SMALL)
    assert len({r.segments[1] for r in trace.requests}) == 3
    assert len({r.segments[2] for r in trace.requests}) == 40
    assert not trace.media


def test_mixed_has_everything():
    trace = make_trace("mixed", replace(SMALL, requests=60))
    assert {m.kind for m in trace.media.values()} == {"image", "video", "audio"}
    assert sum(r.conversation is not None for r in trace.requests) == 20
    assert sum(not r.media_rows for r in trace.requests) == 20
    assert len({m.rows for m in trace.media.values()}) > 3


@pytest.mark.parametrize(
    "change",
    [{"requests": 0}, {"rate": -1.0}, {"rate": float("nan")}, {"exponent": 11.0}, {"rows": 0}, {"turns": 0},
     {"seed": -1}, {"think": float("inf")}, {"turns": 1000, "output_tokens": 10_000}],
)  # fmt: skip
def test_options_are_checked(change):
    with pytest.raises(ConfigError, match="--"):
        make_trace("chat", replace(SMALL, **change))


def test_unknown_kinds():
    with pytest.raises(ConfigError, match="zipf, chat, system-prompts, mixed"):
        make_trace("poisson", SMALL)


# -- token ids and keys ----------------------------------------------------------------------


def test_texts():
    assert text_ids(Text(7, 50))[:20] == text_ids(Text(7, 20))
    assert text_ids(Text(7, 50)) != text_ids(Text(8, 50))
    assert text_ids(Text(2**63 - 1, 3)) == text_ids(Text(2**63 - 1, 3))
    assert len(set(text_ids(Text(0, 1000)))) > 980
    assert min(text_ids(Text(0, 1000))) > 2


def keys(request, block_size=4):
    maker = RequestMaker(get_hasher("xxh3_128"), block_size)
    prepared = maker.make(request, "r")
    contents = Sequence(1, replace(prepared, block_keys=())).fill_contents(
        request.prompt_tokens // block_size, block_size, get_hasher("xxh3_128")
    )
    assert tuple(c.key for c in contents) == prepared.block_keys  # what the scheduler would compute itself
    return prepared.block_keys


def test_keys_are_equal_where_the_trace_is():
    request = TraceRequest(0.0, (Text(1, 6), Media("a", 10, 40), Text(2, 8)), Text(3, 2))
    base = keys(request)
    assert keys(replace(request, segments=(*request.segments[:2], Text(9, 8)))) == (*base[:4], *keys_after(request, 9))
    assert keys(replace(request, segments=(Text(1, 6), Media("b", 10, 40), Text(2, 8))))[:2] != base[:2]
    assert not set(keys(replace(request, salt="other"))) & set(base)


def keys_after(request, seed):
    return keys(replace(request, segments=(*request.segments[:2], Text(seed, 8))))[4:]
