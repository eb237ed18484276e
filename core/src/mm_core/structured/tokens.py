"""What each token writes, found out from a model's tokenizer."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from typing import Any

from mm_core.errors import InvalidGrammarError
from mm_core.structured.library import PARAM, TokenTable

_SPACE = "\u2581"  # how sentencepiece writes a space
_PROBES = 200
_WRONG = 0.02  # share of probes that may differ: tokens that are no text by themselves


def read_tokens(tokenizer: Any, vocab_size: int, ends: Iterable[int]) -> TokenTable:
    """The table of a transformers tokenizer. vocab_size: width of the logits.

    Raises InvalidGrammarError for a tokenizer whose texts are not its tokens' bytes, one after another.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise unsupported("it is none of the tokenizers library")
    settings = json.loads(backend.to_str())
    kinds = _decoders(settings.get("decoder"))
    special = {*backend.get_added_tokens_decoder(), *tokenizer.all_special_ids}
    table: list[bytes] = [b""] * vocab_size
    for text, index in backend.get_vocab(with_added_tokens=True).items():
        if 0 <= index < vocab_size and index not in special:
            table[index] = _bytes_of(text, kinds)
    ended = sorted({index for index in ends if 0 <= index < vocab_size})
    for index in ended:  # one that is text elsewhere, such as OPT's line end, ends a structured answer, too
        table[index] = b""
    unknown = settings.get("model", {}).get("unk_token")
    special |= {index for index, written in enumerate(table) if not written or written == (unknown or "").encode()}
    for index in special & set(range(vocab_size)):
        table[index] = b""
    found = TokenTable(table, sorted(i for i in special if i < vocab_size), ended, _drops_space(tokenizer, table))
    _probe(tokenizer, found)
    return found


def _decoders(settings: Any) -> set[str]:
    """Kinds of the decoders, those within sequences, too."""
    if not isinstance(settings, dict):
        return set()
    kinds = {str(settings.get("type"))}
    return kinds.union(*(_decoders(part) for part in settings.get("decoders", ())))


def _bytes_of(text: str, kinds: set[str]) -> bytes:
    if "ByteLevel" in kinds:
        try:
            return bytes([_BYTE_OF[c] for c in text])
        except KeyError:
            return b""  # no text has it
    if "WordPiece" in kinds:
        return text[2:].encode() if text.startswith("##") else b" " + text.encode()
    if "ByteFallback" in kinds and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes([int(text[3:5], 16)])
    return text.replace(_SPACE, " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes with (Radford et al. 2019)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(shown)]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _drops_space(tokenizer: Any, table: list[bytes]) -> bool:
    """Whether the space of a first token is not in its text."""
    index = next((i for i, b in enumerate(table) if len(b) > 1 and b[:1] == b" " and b[1:].isalpha()), None)
    return index is not None and not _decode(tokenizer, [index]).startswith(" ")


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _probe(tokenizer: Any, table: TokenTable) -> None:
    """Compare the texts of some triples of tokens with their bytes."""
    dice = random.Random(0)
    usable = [i for i, written in enumerate(table.tokens) if written and _is_text(written)]
    if not usable:
        raise unsupported("none of its tokens is text")
    space = table.leading_space  # the first token of an answer begins with one then
    first = [i for i in usable if table.tokens[i][:1] == b" "] if space else usable
    wrong = 0
    for _ in range(_PROBES):
        ids = [dice.choice(first), *dice.choices(usable, k=2)]
        text = b"".join(table.tokens[i] for i in ids).decode()
        wrong += _decode(tokenizer, ids) != text[space:]
    if wrong > _WRONG * _PROBES:
        raise unsupported("its text is not that of its tokens, one after another")


def _is_text(written: bytes) -> bool:
    try:
        written.decode()
    except UnicodeDecodeError:
        return False
    return True


def unsupported(why: str) -> InvalidGrammarError:
    """The error for a tokenizer that no grammar can read."""
    return InvalidGrammarError(
        f"This model's tokenizer cannot be used for structured output: {why}. Leave `structured` out.", param=PARAM
    )
