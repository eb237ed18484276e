"""Write, or check, the outputs that docs/quickstart.md shows for its steps with a server.

`python docs/quickstart_outputs.py --write` or `--check` (exit code 1, and the differences, where a step says something
else by now). Both run the page's own code against a server of its own, on a free port, with the programs beside this
Python (or in --bin). What differs from run to run (times, ids, the port) does not count.
"""

from __future__ import annotations

import argparse
import difflib
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/quickstart.md"
STEPS = "## Serve it\n"
SHOWN_ROOT, SHOWN_URL = "/home/you/mm-core", "http://127.0.0.1:8000"
_PART = re.compile(
    r"^```(?P<kind>bash|py)\n(?P<code>.*?)^```$"
    r"|^<!-- output(?P<stop> \(stop\))?: begin -->\n(?P<shown>.*?)^<!-- output: end -->$",
    re.MULTILINE | re.DOTALL,
)
_TIMEOUT_S = 120.0
# Blocks of Python are one session: reads the length of a block, then the block; a NUL says that it is done.
_SESSION = """import sys
space = {"__name__": "__main__"}
while size := sys.stdin.readline():
    exec(sys.stdin.read(int(size)), space)
    print("\\0", flush=True)
"""
_VARYING = (
    (r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME"),
    (r"\b(chatcmpl|req)-[0-9a-f]+", r"\1-ID"),
    (r'("created"): \d+', r"\1: TIME"),
    (r'("\w+_ms"|"tokens_per_second"): [\d.]+', r"\1: TIME"),
    (r"\bms=[\d.]+", "ms=TIME"),
    (r"KV cache: \d+ tokens in \d+ blocks", "KV cache: ROOM"),  # by the machine's memory
    (r"ready after .*\)", "ready after TIME"),
    (r"[\d.]+ (s|tokens/s)\b", r"TIME \1"),
)
# A slow machine draws bars for what takes seconds; each state of one begins with a carriage return, read as a new line.
_BAR = re.compile(r"^\n?[^\n|]*\d%\|[^\n|]*\|.*\n", re.MULTILINE)


class Program:
    """A program that runs beside this one, and the lines that it writes to either stream."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            for line in stream:
                self._lines.put(line)
        self._lines.put(None)

    def send(self, text: str) -> None:
        """Write to its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(text)
        self.process.stdin.flush()

    def until(self, mark: str | None) -> tuple[str, str]:
        """What it writes before the line that begins so, and that line; None: before its end."""
        text, deadline = "", time.monotonic() + _TIMEOUT_S
        while (line := self._lines.get(timeout=max(deadline - time.monotonic(), 0.1))) is not None:
            if mark is not None and line.startswith(mark):
                return text, line
            text += line
        if mark is not None:
            raise SystemExit(f"{self.process.args!r} ended:\n{text}")
        return text, ""

    def kill(self) -> None:
        """End it, if it still runs."""
        self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self._reader.join(_TIMEOUT_S)


# For machines without curl: as much of it as the page uses.
_CURL = """#!{python}
import sys, urllib.request
words = sys.argv[1:]
url = next(word for word in words if word.startswith("http"))
headers = dict(words[i + 1].split(": ", 1) for i, word in enumerate(words) if word == "-H")
data = sys.stdin.buffer.read() if "@-" in words else None
sys.stdout.buffer.write(urllib.request.urlopen(urllib.request.Request(url, data, headers)).read())
"""


class Steps:
    """Runs the page's code, block by block."""

    def __init__(self, programs: Path) -> None:
        kept = {n: v for n, v in os.environ.items() if not n.lower().endswith("_proxy") and not n.startswith("MM_")}
        path = f"{programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        self._own = tempfile.TemporaryDirectory()
        if shutil.which("curl", path=path) is None:
            stand_in = Path(self._own.name) / "curl"
            stand_in.write_text(_CURL.format(python=programs / "python"), encoding="utf-8")
            stand_in.chmod(0o755)
            path = f"{self._own.name}{os.pathsep}{path}"
        self._environment = {
            **kept, "PATH": path, "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        self._programs = programs
        self._url = SHOWN_URL
        self._server: Program | None = None
        self._session: Program | None = None

    def run(self, kind: str, code: str) -> str:
        """What a block writes, as the page shows it. Installing is left out: it was done for `programs`."""
        code = re.sub(r"^pip install .*\n", "", code, flags=re.MULTILINE)
        if code.startswith("mm serve"):
            return self._shown(self._serve(code.split()[1:]))
        code = code.replace(SHOWN_URL, self._url)
        return self._shown(self._python(code) if kind == "py" else self._bash(code))

    def stop(self) -> str:
        """Ends the server as Ctrl-C does; what it has written since it listened."""
        if self._server is None:
            raise SystemExit(f"{PAGE.name} stops a server that it has not started.")
        self._server.process.send_signal(signal.SIGINT)
        text, _ = self._server.until(None)
        if self._server.process.wait(_TIMEOUT_S) != 0:
            raise SystemExit(f"The server ended with {self._server.process.returncode}:\n{text}")
        return self._shown(text)

    def close(self) -> None:
        """End what still runs."""
        self._own.cleanup()
        for program in (self._session, self._server):
            if program is not None:
                program.kill()

    def _serve(self, arguments: list[str]) -> str:
        command = [str(self._programs / "mm"), *arguments, "--port", "0"]
        self._server = Program(command, self._environment)
        text, last = self._server.until("listening on ")
        self._url = last.removeprefix("listening on ").strip()
        return text + last

    def _bash(self, code: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code], cwd=ROOT, env=self._environment, text=True, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_TIMEOUT_S,
        )  # fmt: skip
        if done.returncode != 0:
            raise SystemExit(f"A step failed:\n{code}\n{done.stdout}")
        return done.stdout

    def _python(self, code: str) -> str:
        if self._session is None:
            self._session = Program([str(self._programs / "python"), "-c", _SESSION], self._environment)
        self._session.send(f"{len(code)}\n{code}")
        return self._session.until("\0")[0]

    def _shown(self, text: str) -> str:
        return without_bars(text).replace(self._url, SHOWN_URL).replace(str(ROOT), SHOWN_ROOT)


def without_bars(text: str) -> str:
    """What a program wrote, without its progress bars."""
    return _BAR.sub("", text)


def fresh(text: str, programs: Path) -> str:
    """The page with the outputs of a run of its steps."""
    if text.count(STEPS) != 1:
        raise SystemExit(f"{PAGE.name} needs the heading {STEPS.strip()!r}, once.")
    head, section = text.split(STEPS)
    code: tuple[str, str] | None = None
    with closing(Steps(programs)) as steps:

        def again(part: re.Match[str]) -> str:
            nonlocal code
            if part["kind"]:
                code = (part["kind"], part["code"])
                return part[0]
            if not part["stop"] and code is None:
                raise SystemExit(f"{PAGE.name} has an output without a step.")
            output = steps.stop() if part["stop"] or code is None else steps.run(*code)
            code = None
            mark = f"<!-- output{part['stop'] or ''}: begin -->"
            return f"{mark}\n```text\n{output.rstrip()}\n```\n<!-- output: end -->"

        return f"{head}{STEPS}{_PART.sub(again, section)}"


def lasting(text: str) -> str:
    """The page without what differs from run to run."""
    for pattern, name in _VARYING:
        text = re.sub(pattern, name, text)
    return text


def differences(shown: str, found: str) -> list[str]:
    """Lines in which two pages differ, beyond times and ids; none: they say the same."""
    return [
        line
        for line in difflib.unified_diff(lasting(shown).splitlines(), lasting(found).splitlines(), n=0, lineterm="")
        if not line.startswith(("---", "+++", "@@"))
    ]


def main() -> int:
    """Write or check; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="write the outputs into docs/quickstart.md")
    action.add_argument("--check", action="store_true", help="exit with 1 if a step says something else by now")
    parser.add_argument("--bin", type=Path, default=Path(sys.executable).parent, help="directory of mm and python")
    options = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    found = fresh(text, options.bin.absolute())
    if options.write:
        PAGE.write_text(found, encoding="utf-8")
    elif differing := differences(text, found):
        print("\n".join(differing), file=sys.stderr)
        print("docs/quickstart.md is out of date. Run: python docs/quickstart_outputs.py --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
