"""Prompts to token ids: templates, special tokens, placeholders and their expansion.

Text of users inside messages is never parsed for special tokens: a picture's placeholder enters a
prompt through the chat template only, however the text around it is spelt.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from mm_core.errors import ContextLengthError, InvalidPromptError, MMError, PlaceholderMismatchError, PluginError
from mm_core.hookspecs import Processor
from mm_core.inputs.messages import Given
from mm_core.types import MediaFeature, Modality, PlaceholderRange

Ids = list[int]

LONG_TEXT = 4096  # characters


class PromptRenderer:
    """Text, ids or messages to prompt ids with one placeholder id an item. Thread-safe.

    Two tokenizer backends are used and neither is ever changed: the checkpoint's own, which knows
    special tokens, and a copy that takes their spelling for plain text.
    """

    def __init__(self, processor: Processor, family: str, vocab_size: int, max_model_len: int) -> None:
        self._processor = processor
        self._family = family
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._backend = _backend_of(processor.tokenizer)
        found = {m: (processor.placeholder(m), processor.placeholder_id(m)) for m in processor.modalities}
        self._spellings = {text for text, _ in found.values() if text is not None}
        self._placeholder_ids: dict[int, Modality] = {i: m for m, (_, i) in found.items() if i is not None}
        self._literal, self._controls = _literal_backend(self._backend, self._spellings)
        self._edges = {text[0] for text in self._controls} | {text[-1] for text in self._controls}
        self._control_ids = frozenset(self._controls.values()) | frozenset(self._placeholder_ids)
        self._longest_token = max((len(t) for t in self._backend.get_vocab(with_added_tokens=True)), default=1)

    def render(self, given: Given, apply_chat_template: bool | None) -> Ids:
        """Prompt ids in which each item has exactly one placeholder id (or none, where the processor
        accepts the prompt as it stands).

        Raises InvalidPromptError, PlaceholderMismatchError, ContextLengthError.
        """
        counts = count_items(given)
        if given.messages is not None:
            if apply_chat_template is False:
                raise InvalidPromptError("Messages need the chat template: leave out apply_chat_template=False.")
            ids = self._chat_ids(given.messages)
            verbatim: str | None = None
        elif given.token_ids is not None:
            if apply_chat_template:
                raise InvalidPromptError("prompt_token_ids cannot go through a chat template. Pass `prompt` instead.")
            ids = self._checked_ids(given.token_ids)
            verbatim = str(self._processor.tokenizer.decode(ids)) if counts else None
        else:
            verbatim = given.text or ""
            if self._is_turn(verbatim, counts, apply_chat_template):
                ids, verbatim = self._chat_ids([_user_turn(verbatim, given)]), None
            else:
                ids = self._verbatim_ids(verbatim)
        if not ids:
            raise InvalidPromptError("The prompt is empty. Write some text.", param="prompt")
        self._check_placeholders(ids, counts, verbatim)
        if len(ids) + 1 > self._max_model_len:
            raise too_long(len(ids), self._max_model_len)
        return ids

    def instruction(self, given: Given, ids: Ids) -> str:
        """What `Fusion.instruction` takes of a request that was rendered to `ids`: the text as the user wrote it,
        or the rendered messages, or the decoded ids; without placeholders, the latter two without special tokens."""
        if given.text is not None:
            return _without(given.text, self._spellings)
        if given.messages is not None:
            return _without(self._apply_template(given.messages), self._controls)
        return str(self._processor.tokenizer.decode([i for i in ids if i not in self._control_ids]))

    def expand(self, ids: Ids, features: Sequence[MediaFeature]) -> tuple[Ids, tuple[PlaceholderRange, ...]]:
        """Put each item's expansion in place of its placeholder; one pass.

        features: in the order given; those of one modality take its placeholders from left to right.
        Items without a placeholder (prompts accepted as they stand) come first. Ranges are in
        prompt order. Raises PluginError where an expansion breaks the contract.
        """
        places = self._placeholders_in(ids)
        waiting: dict[Modality, list[MediaFeature]] = {}
        for feature in reversed(features):
            waiting.setdefault(feature.modality, []).append(feature)
        out: Ids = []
        ranges: list[PlaceholderRange] = []
        if not places:
            for feature in features:
                self._append(feature, out, ranges)
        begin = 0
        for place, modality in places:
            if queue := waiting.get(modality):
                out += ids[begin:place]
                self._append(queue.pop(), out, ranges)
                begin = place + 1
        out += ids[begin:]
        return out, tuple(ranges)

    def _placeholders_in(self, ids: Ids) -> list[tuple[int, Modality]]:
        """Where placeholders stand, from left to right; found by the list's own search, not token by token."""
        found: list[tuple[int, Modality]] = []
        for token, modality in self._placeholder_ids.items():
            place = -1
            for _ in range(ids.count(token)):
                place = ids.index(token, place + 1)
                found.append((place, modality))
        return sorted(found)

    def _append(self, feature: MediaFeature, out: Ids, ranges: list[PlaceholderRange]) -> None:
        token_ids, is_media = guarded(self._family, "expand", lambda: self._processor.expand(feature))
        mask = _as_mask(is_media)
        rows = mask.count(True)
        cross = not mask and not token_ids  # cross-attention: rows, and no tokens that stand for them
        if len(token_ids) != len(mask) or (rows != feature.num_placed and not cross):
            raise PluginError(
                f"Processor of plugin {self._family!r}: expand() gave {len(token_ids)} ids and a mask of {len(mask)} "
                f"with {rows} rows for an item of {feature.num_placed} rows. All must agree; report it to its author."
            )
        ranges.append(PlaceholderRange(len(out), len(mask), mask, feature))
        out.extend(token_ids)

    def _is_turn(self, text: str, counts: Mapping[Modality, int], apply_chat_template: bool | None) -> bool:
        """Whether the text is one user turn, and not a complete prompt."""
        if apply_chat_template is not None:
            return apply_chat_template
        if not counts or any(spelling in text for spelling in self._spellings):
            return False
        return not self._processor.accepts_verbatim(text, counts)

    def _check_placeholders(self, ids: Ids, counts: Mapping[Modality, int], verbatim: str | None) -> None:
        found: dict[Modality, int] = {}
        for _, modality in self._placeholders_in(ids):
            found[modality] = found.get(modality, 0) + 1
        placed = set(self._placeholder_ids.values())  # other items have no place in a prompt
        if found == {modality: count for modality, count in counts.items() if modality in placed}:
            return
        if not found and verbatim is not None and self._processor.accepts_verbatim(verbatim, counts):
            return
        told = []
        for modality in self._processor.modalities:
            have, want = found.get(modality, 0), counts.get(modality, 0)
            if have != want and modality in placed:
                told.append(f"{have} × {self._processor.placeholder(modality)!r} for {want} item(s) of {modality}")
        raise PlaceholderMismatchError(
            f"The prompt has {', '.join(told)}. Write one placeholder an item, or none at all: a prompt with media "
            "and without placeholders becomes one user turn of the chat template.",
            param="prompt",
        )

    def _verbatim_ids(self, text: str) -> Ids:
        self._check_text(text)
        return self._encode(text, add_special_tokens=getattr(self._processor, "add_special_tokens", True))

    def _checked_ids(self, token_ids: Sequence[int]) -> Ids:
        size = _num_ids(token_ids)
        if size + 1 > self._max_model_len:  # before they are looked at one by one
            raise too_long(size, self._max_model_len)
        values = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        if not isinstance(values, list | tuple) or not values:
            raise InvalidPromptError("prompt_token_ids is a list of at least one token id.", param="prompt_token_ids")
        for token in values:
            if type(token) is not int or not 0 <= token < self._vocab_size:
                raise InvalidPromptError(
                    f"prompt_token_ids holds something else than ids from 0 to {self._vocab_size - 1}.",
                    param="prompt_token_ids",
                )
        return list(values)

    def _check_text(self, text: str) -> None:
        try:
            nbytes = len(text.encode())
        except UnicodeEncodeError:
            error = InvalidPromptError(
                "The text holds half of a surrogate pair, which is no character. Send valid Unicode.", param="prompt"
            )
            error.code = "invalid_unicode"
            raise error from None
        if nbytes > self._max_model_len * self._longest_token or self._is_long(text):
            raise ContextLengthError(
                f"The text has {nbytes} bytes; the model's context is {self._max_model_len} tokens. Shorten it.",
                param="prompt",
            )

    def _is_long(self, text: str) -> bool:
        """Whether a beginning of a very long text is too long already; spares tokenizing all of it."""
        size = 8 * self._max_model_len
        while size < len(text):
            # A cut may split a token or two, never hundreds.
            if len(self._tokenize(self._backend, text[:size])) > self._max_model_len + 256:
                return True
            size *= 4
        return False

    def _tokenize(self, backend: Any, text: str, *, add_special_tokens: bool = False) -> Ids:
        """Ids of a text. The library keeps the interpreter's lock for a single text, however long (20 ms for
        50,000 characters), and lets go of it for a list; for a short one the list takes longer."""
        if len(text) < LONG_TEXT:
            encoding = backend.encode(text, add_special_tokens=add_special_tokens)
        else:
            (encoding,) = backend.encode_batch([text], add_special_tokens=add_special_tokens)
        ids: Ids = encoding.ids
        return ids

    def _encode(self, text: str, *, add_special_tokens: bool = False) -> Ids:
        ids = self._tokenize(self._backend, text, add_special_tokens=add_special_tokens)
        if ids and max(ids) >= self._vocab_size:
            raise InvalidPromptError(
                f"The prompt holds token {max(ids)}; the model knows {self._vocab_size}. Leave that special token out.",
                param="prompt",
            )
        return ids

    def _chat_ids(self, messages: Sequence[Mapping[str, Any]]) -> Ids:
        """Messages through the template, the texts in them being plain text whatever they spell.

        Text and template are tokenized together, as the model was trained. If that makes other
        special tokens than the template alone has, they are tokenized apart.
        """
        texts = _texts_of(messages)
        for text in texts:
            self._check_text(text)
        start = self._encode("", add_special_tokens=getattr(self._processor, "start_chat", False))
        joint = start + self._encode(self._apply_template(messages))
        if not any(self._suspicious(text) for text in texts):
            return joint
        pieces = self._template_pieces(messages)
        encoded = [start, *(self._encode(piece) if isinstance(piece, str) else piece for piece in pieces)]
        wanted = [i for piece in encoded if isinstance(piece, list) for i in piece if i in self._control_ids]
        if [i for i in joint if i in self._control_ids] == wanted:
            return joint
        apart: Ids = []
        for piece in encoded:
            apart += piece if isinstance(piece, list) else self._literal_ids(texts[piece])
        return apart

    def _apply_template(self, messages: Sequence[Mapping[str, Any]]) -> str:
        call = self._processor.apply_chat_template
        return str(guarded(self._family, "apply_chat_template", lambda: call(messages)))

    def _suspicious(self, text: str) -> bool:
        """Whether the text could be part of a special token's spelling, alone or with its neighbours."""
        return not self._edges.isdisjoint(text) or (self._backend.normalizer is not None and not text.isascii())

    def _template_pieces(self, messages: Sequence[Mapping[str, Any]]) -> list[str | int]:
        """The rendered prompt as template pieces (str) and indices into `_texts_of(messages)`.

        The texts are replaced by marks that no user can guess, and found again after rendering.
        """
        token = secrets.token_hex(8)
        rendered = self._apply_template(_with_marks(messages, token))
        split = re.split(f"\ue000{token}([0-9]+)\ue001", rendered)
        return [int(piece) if index % 2 else piece for index, piece in enumerate(split)]

    def _literal_ids(self, text: str) -> Ids:
        """Ids of plain text: no special token among them, whatever the text spells."""
        ids = self._tokenize(self._literal, text)
        if self._control_ids.isdisjoint(ids):
            return ids
        # Vocabularies that hold special tokens as ordinary pieces: cut each spelling after its first character.
        cut = re.sub(_any_of(self._controls), lambda m: m[0][0] + "\ue000" + m[0][1:], text)
        parts = (self._literal.encode(part, add_special_tokens=False).ids for part in cut.split("\ue000"))
        return [i for part in parts for i in part if i not in self._control_ids]


def _any_of(spellings: Iterable[str]) -> str:
    """A pattern for any of these texts, the longest that fits."""
    return "|".join(re.escape(text) for text in sorted(spellings, key=len, reverse=True))


def _without(text: str, spellings: Collection[str]) -> str:
    return re.sub(_any_of(spellings), "", text) if spellings else text


def _as_mask(is_media: Sequence[bool]) -> tuple[bool, ...]:
    """What a plugin gave as bools. Thousands of True in a tuple, the usual case, are not looked at one by one."""
    if type(is_media) is tuple and is_media.count(True) + is_media.count(False) == len(is_media):
        return is_media
    return tuple([bool(m) for m in is_media])


def is_long(given: Given) -> bool:
    """Whether rendering takes so long that others should not wait for it."""
    messages = given.messages or ()
    texts = _texts_of(messages)
    size = sum(map(len, texts)) + len(given.text or "")
    return max(size, len(messages), len(texts), _num_ids(given.token_ids)) >= LONG_TEXT


def _num_ids(token_ids: Any) -> int:
    """How many ids there are; 0 where that is no list of ids, or one of no length."""
    try:
        return len(token_ids) if isinstance(token_ids, list | tuple) or hasattr(token_ids, "tolist") else 0
    except TypeError:  # an array without dimensions
        return 0


def count_items(given: Given) -> dict[Modality, int]:
    """Items by modality; modalities without items are absent."""
    counts: dict[Modality, int] = {}
    for item in given.items:
        counts[item.modality] = counts.get(item.modality, 0) + 1
    return counts


def too_long(tokens: int, max_model_len: int) -> ContextLengthError:
    """The error for a prompt that leaves no room for an answer."""
    return ContextLengthError(
        f"The prompt has {tokens} tokens, media included, and the model's context is {max_model_len}: no room for an "
        "answer. Shorten the prompt, send fewer or smaller media (max_pixels, fps), or raise max_model_len.",
        param="prompt",
    )


def guarded(family: str, hook: str, call: Callable[[], Any]) -> Any:
    """Call a plugin's code; what it raises beside MMErrors becomes a PluginError that names it."""
    try:
        return call()
    except MMError:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"Plugin {family!r} failed in {hook}() with {type(error).__name__}. Report it to the plugin's author."
        ) from error


def _backend_of(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise PluginError(
            f"Tokenizer {type(tokenizer).__name__} has no `backend_tokenizer`. mm-core needs one of the tokenizers "
            "library: load it with AutoTokenizer."
        )
    if backend.padding is None and backend.truncation is None:
        return backend
    plain = type(backend).from_str(backend.to_str())  # some checkpoints pad every text to the longest there may be
    plain.no_padding()
    plain.no_truncation()
    return plain


def _literal_backend(backend: Any, placeholders: set[str]) -> tuple[Any, dict[str, int]]:
    """A copy of the backend to which special tokens and placeholders are plain text, and those
    spellings with their ids."""
    from tokenizers import AddedToken

    added = backend.get_added_tokens_decoder()
    controls = {token.content: int(i) for i, token in added.items() if token.special or token.content in placeholders}
    literal = type(backend).from_str(backend.to_str())
    literal.no_truncation()
    literal.no_padding()
    literal.add_special_tokens([AddedToken(content, special=True) for content in controls])
    literal.encode_special_tokens = True  # special ones are then plain text
    return literal, controls


def _user_turn(text: str, given: Given) -> dict[str, Any]:
    """One user message: the media in the order given, then the text."""
    parts: list[dict[str, str]] = [{"type": item.modality} for item in given.items]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}


def _texts_of(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    texts: list[str] = []
    for message in messages:
        content = message["content"]
        texts += [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]
    return texts


def _with_marks(messages: Sequence[Mapping[str, Any]], token: str) -> list[dict[str, Any]]:
    """The messages with their texts, in the order of `_texts_of`, replaced by numbered marks.

    Empty texts stay, as templates may ask whether there is any.
    """
    index = -1

    def mark(text: str) -> str:
        nonlocal index
        index += 1
        return f"\ue000{token}{index}\ue001" if text else text

    marked: list[dict[str, Any]] = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            content = mark(content)
        else:
            content = [{**p, "text": mark(p["text"])} if p["type"] == "text" else p for p in content]
        marked.append({**message, "content": content})
    return marked
