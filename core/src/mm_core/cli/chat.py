"""`mm chat`: talk with a model in the terminal, with pictures, recordings and videos by path."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urlsplit

from mm_core.cli.run import SUFFIXES, kind_of
from mm_core.errors import ConfigError, MediaError, MMError
from mm_core.zoo import default_model

if TYPE_CHECKING:
    from mm_core.cli.chat_backends import Backend, Kind, Medium, Turn

KEY_VARIABLE = "MM_API_KEY"
_OPENAI = ("OPENAI_API_KEY", "api.openai.com")  # that key goes to that host alone
_MOST_BYTES = 512 * 2**20
_HELP = """\
Write, and press Enter. A backslash at the end of a line goes on in the next one.
A path in the message (quoted, or its spaces escaped, as when a file is dropped on the terminal) goes along with it.
  /image PATH, /audio PATH, /video PATH   goes along with the next message
  /reset                                  forget the conversation
  /help                                   this
  /quit, Ctrl-D                           leave
Ctrl-C stops an answer."""
# A quoted text, or a word whose spaces are escaped; what ends a sentence may follow.
_MARKS = "?!.,;:)"
_WORD = re.compile(r"""(?<!\S)(?:'([^']+)'(?=[?!.,;:)\s]|$)|"([^"]+)"(?=[?!.,;:)\s]|$)|((?:\\.|\S)+))""")
_EDGES = re.compile(r"\A(?:\s*\0[^\0]*\0(?=\s|\Z))+|(?:(?:\A|\s)\s*\0[^\0]*\0)+\s*\Z")  # files around the text
_ADDRESS = re.compile(r"(?:[\w.-]+|\[[0-9a-fA-F:.]+\]):[0-9]{1,5}(?:/.*)?")  # of a server, without its scheme
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mm chat`."""
    parser.description = (
        "With a URL, the server there answers (OpenAI's API); with a model, an engine in this process; without either, "
        "the small model that the project ships."
    )
    parser.add_argument("target", nargs="?", metavar="URL_OR_MODEL", help="http(s)://…, or a directory or hub id")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="at most N an answer (default 1024, or the server's)"
    )
    parser.add_argument("--temperature", type=float, help="0 takes the best token always (default 0, or the server's)")
    parser.add_argument("--seed", type=int, help="makes sampled answers repeatable")
    server = parser.add_argument_group("with a URL")
    server.add_argument("--model", metavar="NAME", help="as the server calls it (default: the first it lists)")
    server.add_argument("--api-key", metavar="KEY", help=f"default: ${KEY_VARIABLE}; for OpenAI ${_OPENAI[0]}")
    engine = parser.add_argument_group("with a model")
    engine.add_argument("--revision", help="branch, tag or commit of a hub id")
    engine.add_argument("--device", help='"auto" (default), "cpu", "cuda" or "cuda:0"')
    engine.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="default: auto")


def chat(arguments: argparse.Namespace) -> int:
    """Talk until the input ends. 1 where an answer failed and nobody was there to see it."""
    with contextlib.closing(_backend(arguments)) as backend:
        return Conversation(backend, arguments.system).run()


def _backend(arguments: argparse.Namespace) -> Backend:
    from mm_core.cli.chat_backends import LocalBackend, RemoteBackend

    target: str | None = arguments.target
    given = {name: getattr(arguments, name) for name in ("max_tokens", "temperature", "seed")}
    sampling = {name: value for name, value in given.items() if value is not None}
    remote = target is not None and target.lower().startswith(("http://", "https://"))
    _check(arguments, remote)
    if remote and target is not None:
        return RemoteBackend(target, model=arguments.model, key=_key(arguments, target), options=sampling)
    from mm_core.config import SamplingParams
    from mm_core.engine.engine import Engine

    params = SamplingParams(**{"max_tokens": 1024, "temperature": 0.0, **sampling})
    name = str(default_model()) if target is None else target
    device, dtype = arguments.device or "auto", arguments.dtype or "auto"
    engine = Engine.from_pretrained(name, revision=arguments.revision, device=device, dtype=dtype)
    return LocalBackend(engine, params, name)


def _check(arguments: argparse.Namespace, remote: bool) -> None:
    """Refuse options that would do nothing (wrong usage), and an address without its scheme (ConfigError)."""
    target: str | None = arguments.target
    if target is not None and not remote and _ADDRESS.fullmatch(target) and not Path(target).exists():
        raise ConfigError(f"There is no model {target!r}. If it is a server's address, write http://{target}.")
    for name in ("device", "dtype", "revision") if remote else ("model", "api_key"):
        if getattr(arguments, name) is not None:
            goes = "a model, not with a URL" if remote else "a URL (http://… or https://…), and none is given"
            arguments.usage_error(f"--{name.replace('_', '-')} goes with {goes}")


def _key(arguments: argparse.Namespace, url: str) -> str | None:
    given: str | None = arguments.api_key or os.environ.get(KEY_VARIABLE)
    if given is None and urlsplit(url).hostname == _OPENAI[1]:
        given = os.environ.get(_OPENAI[0])
    return given


class Conversation:
    """What was said, what goes along with the next message, and the terminal. Answers go to stdout, all else to
    stderr; where stdin is no terminal, its lines are the messages and nothing is prompted for."""

    def __init__(self, backend: Backend, system: str | None = None) -> None:
        from mm_core.cli.chat_backends import Turn

        self._turn = Turn
        self._backend = backend
        self._begin = [] if system is None else [Turn("system", system)]
        self._turns: list[Turn] = list(self._begin)
        self._media: list[Medium] = []
        self._seen = sys.stdin.isatty()
        self._failed = False

    def run(self) -> int:
        """Until the input ends, or /quit."""
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        if self._seen:
            with contextlib.suppress(ImportError):  # there it is, input() has a history and keys to edit with
                import readline  # noqa: F401
            self._note(f"{self._backend.name}: /help tells how, Ctrl-D leaves.")
        while True:
            try:
                message = self._message()
                if message is None or message in ("/quit", "/exit"):
                    break
                self._take(message)
            except MMError as error:
                self._failed = True
                self._note(f"mm: error: {' '.join(str(error).split())}")
            except KeyboardInterrupt:
                if not self._seen:
                    raise
                self._note("\n(Ctrl-D leaves)")
        return int(self._failed and not self._seen)

    def _message(self) -> str | None:
        """The next line, with those behind it where it ends in a backslash; None at the input's end."""
        lines: list[str] = []
        while True:
            try:
                line = input(("… " if lines else "> ") if self._seen else "")
            except EOFError:
                if self._seen:
                    print(file=sys.stderr)
                return "\n".join(lines).strip() or None
            if not line.endswith("\\"):
                return "\n".join([*lines, line]).strip()
            lines.append(line[:-1])

    def _take(self, message: str) -> None:
        """A command, or something to answer."""
        command, _, rest = message.partition(" ")
        name = command.removeprefix("/")
        if command == "/help":
            self._note(_HELP)
        elif command == "/reset":
            self._turns, self._media = list(self._begin), []
            self._note("(forgotten)")
        elif command.startswith("/") and name in SUFFIXES:
            self._attach(read_medium(_bare(rest.strip()), cast("Kind", name)))
        elif re.fullmatch(r"/[a-z]+", command) and not Path(command).exists():
            self._note(f"There is no {command}; /help lists what there is.")
        elif message:
            text, media = split_message(message)
            for medium in media:
                self._attach(medium)
            self._ask(text)

    def _attach(self, medium: Medium) -> None:
        self._media.append(medium)
        self._note(f"({medium.kind} {medium.name}, {len(medium.data):,} bytes)")

    def _ask(self, text: str) -> None:
        """Answer a message. A question that failed is forgotten, and so are its media; one that was stopped is kept
        with what was said."""
        asked = self._turn("user", text, tuple(self._media))
        self._media = []
        said, stopped = "", False
        with contextlib.closing(self._backend.answer([*self._turns, asked])) as answer:
            try:
                for text in shown(answer):
                    said = text
            except KeyboardInterrupt:
                if not self._seen:
                    raise
                stopped = True
            finally:
                if said:
                    print(flush=True)
        if not said:
            self._note("(stopped)" if stopped else f"(no answer) {self._backend.stats.line()}")
            return
        self._turns += [asked, self._turn("assistant", said)]
        self._note(f"(stopped) {self._backend.stats.line()}" if stopped else self._backend.stats.line())

    def _note(self, text: str) -> None:
        dim = sys.stderr.isatty() and "NO_COLOR" not in os.environ
        print(f"\x1b[2m{text}\x1b[0m" if dim else text, file=sys.stderr, flush=True)


def shown(texts: Iterator[str]) -> Iterator[str]:
    """Print what each text adds to the one before; gives them on. A text that changes what was printed is printed
    whole. Control characters are shown as such: no model may write to the terminal what it likes."""
    told = ""
    for text in texts:
        if not text.startswith(told):
            print()
            told = ""
        print(_CONTROL.sub("\ufffd", text[len(told) :]), end="", flush=True)
        told = text
        yield text


def split_message(message: str) -> tuple[str, list[Medium]]:
    """A message's text, and the files of media that it names: those before or behind the text are left out of it, of
    those within it the names stay. Words that only look like one stay text; a path from
    the root, or from home, that names none is MediaError."""
    media: list[Medium] = []

    def take(match: re.Match[str]) -> str:
        quoted = match[1] or match[2]
        word = quoted or match[3].rstrip(_MARKS)
        path = _path(word if quoted else re.sub(r"\\(.)", r"\1", word))
        kind = kind_of(str(path))
        if kind is None or not (path.is_file() or path.is_absolute()):
            return match[0]
        media.append(read_medium(str(path), cast("Kind", kind)))
        return f"\0{path.name}\0" + ("" if quoted else match[3][len(word) :])

    text = _EDGES.sub("", _WORD.sub(take, message.replace("\0", "")))
    return text.replace("\0", "").strip(), media


def read_medium(path: str, kind: Kind) -> Medium:
    """A file's content. Raises MediaError where there is no file, or nothing in it."""
    from mm_core.cli.chat_backends import Medium
    from mm_core.media.decode import read_regular_file

    if not path:
        raise MediaError(f"/{kind} needs the path of a file.")
    found = _path(path)
    data = read_regular_file(found, _MOST_BYTES)
    if not data:
        _refuse_empty(kind)
    return Medium(kind, found.name, data)


def _refuse_empty(kind: Kind) -> None:
    """The decoder's own error for no bytes at all: no server need be asked."""
    from mm_core.media import audio, decode, video

    if kind == "image":
        decode.decode_image(b"")
    elif kind == "audio":
        audio.decode_audio(b"")
    else:
        video.decode_chosen(b"", lambda _total, _fps: [])


def _bare(text: str) -> str:
    """A path without its quotes or backslashes, if it is not that of a file as it stands."""
    if _path(text).is_file():
        return text
    match = _WORD.fullmatch(text)
    if match is None:
        return text
    return match[1] or match[2] or re.sub(r"\\(.)", r"\1", match[3])


def _path(text: str) -> Path:
    """Of a path, with ~ for home, or of a file: URL, as some terminals write what is dropped on them."""
    parts: Any = urlsplit(text) if text.startswith("file:///") else None
    with contextlib.suppress(RuntimeError):  # no such user
        return Path(unquote(parts.path) if parts else text).expanduser()
    return Path(text)
