"""Write, or check, the README's table of supported models from the plugins that are installed.

`python docs/support_table.py --write` or `--check` (exit code 1 where the table is out of date).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mm_core.plugins import PluginRegistry

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"


def table(registry: PluginRegistry) -> str:
    """Markdown: one row an architecture."""
    lines = ["| architecture (`config.json`) | media | plugin | version |", "|---|---|---|---|"]
    infos = {info.name: info for info in registry.describe()}
    for info in infos.values():
        if info.error is not None:
            raise SystemExit(f"Plugin {info.label} is not used: {info.error}")
    for owner in registry.owners("mm_families"):
        info, media = infos[owner.plugin], ", ".join(owner.family.modalities)
        lines += [f"| `{a}` | {media} | `{info.distribution}` | {info.version} |" for a in owner.family.architectures]
    return "\n".join(lines)


def updated(text: str) -> str:
    """The README with the table between its markers made anew."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{README.name} needs the lines {BEGIN} and {END}, once each.")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{table(PluginRegistry())}\n{END}{rest.split(END)[1]}"


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
        print("README.md's support table is out of date. Run: python docs/support_table.py --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
