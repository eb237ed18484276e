"""From what a request asks for to the text of a grammar, as llguidance reads it."""

from __future__ import annotations

import json
from typing import Any

from mm_core.config import StructuredOutput
from mm_core.structured.library import load

# Tokens are never forced: any spelling of a forced text is as good, and the model chooses among them.
_OPTIONS = '%llguidance {"no_forcing": true}\n'
# Where JSON may have blanks there is one, or a line's end and an indent: an answer of nothing but blanks ends.
_BLANKS = r"[ ]|\n[ ]{0,32}"
_JSON_OPTIONS = {
    "whitespace_flexible": True,
    "whitespace_pattern": _BLANKS,
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": True,
    "lenient": False,
}


def grammar_text(spec: StructuredOutput, leading_space: bool) -> str:
    """The grammar of the tokens' bytes. leading_space: as in `TokenTable`; the first token then writes one more."""
    begin = '" " ' if leading_space else ""
    first = {"lark_grammar": f"{_OPTIONS}start: {begin}@answer"}
    return json.dumps({"grammars": [first, {"name": "answer", **_answer(spec)}]}, ensure_ascii=False)


def _answer(spec: StructuredOutput) -> dict[str, Any]:
    if spec.json_schema is not None:
        return _json(json.loads(spec.json_schema))
    if spec.json_object:
        return _json({"type": "object"})
    if spec.regex is not None:
        return {"lark_grammar": f"start: /{load().regex_to_lark(spec.regex)}/"}
    if spec.grammar is not None:
        return {"lark_grammar": spec.grammar}
    return {"lark_grammar": f"start: /{'|'.join(map(_literal, spec.choice))}/"}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"json_schema": {**schema, "x-guidance": _JSON_OPTIONS}}


def _literal(text: str) -> str:
    """An expression that matches the text alone."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)
