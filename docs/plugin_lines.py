"""Write, or check, the README's table of how long each plugin is.

`python docs/plugin_lines.py --write` or `--check` (exit code 1 where the table is out of date). Everything below a
plugin's src/ counts, its benchmark's models included; tests do not.
"""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- plugin lines: begin -->", "<!-- plugin lines: end -->"
# Lines of the same family's model file in engines that keep families inside.
ELSEWHERE = {"qwen2vl": 1875, "llava": 741, "blip2": 707, "whisper": 1092, "nvila": 355}
_NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
            tokenize.ENDMARKER)  # fmt: skip


def count(path: Path) -> tuple[int, int]:
    """A file's lines, and those of them that hold code: no blank ones, comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    code = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in _NO_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and ast.get_docstring(node):
                code -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(text.splitlines()), len(code)


def table() -> str:
    """Markdown: one row a plugin, and one for the guide's."""
    homes = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
    homes += sorted(path.parent for path in ROOT.glob("docs/examples/*/pyproject.toml"))
    lines = ["| plugin | lines | of these, code | elsewhere, lines |", "|---|---|---|---|"]
    for home in homes:
        counts = [count(path) for path in sorted((home / "src").rglob("*.py"))]
        total, code = (sum(column) for column in zip(*counts, strict=True))
        other = f"{ELSEWHERE[home.name]:,}" if home.name in ELSEWHERE else "–"
        place = home.relative_to(ROOT).as_posix()
        lines.append(f"| [{home.name.removeprefix('mm-plugin-')}]({place}) | {total:,} | {code:,} | {other} |")
    return "\n".join(lines)


def updated(text: str) -> str:
    """The README with the table between its markers made anew."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{README.name} needs the lines {BEGIN} and {END}, once each.")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Write or check; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="write the table into README.md")
    action.add_argument("--check", action="store_true", help="exit with 1 if the table is out of date")
    options = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    if options.write:
        README.write_text(updated(text), encoding="utf-8")
    elif updated(text) != text:
        print("README.md's table of lines is out of date. Run: python docs/plugin_lines.py --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
