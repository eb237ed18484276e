"""Put the kernels' measured figures into docs/benchmarks/README.md, each against its ceiling.

    python tests/bench/kernel_table.py [docs/benchmarks/kernels-h100.json]

The JSON file is what `tests/kernels/bench_kernels.py --json` wrote on a machine with a GPU. Ceilings are
those the same run measured: reading 1 GiB for what is bound by memory, a bf16 matrix product of 8192³ for
the rest.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks"
BEGIN, END = "<!-- kernels:begin -->", "<!-- kernels:end -->"
CEILINGS = {"TB/s": "read 1 GiB (sum)", "TFLOP/s": "matmul 8192"}


def table(found: dict[str, Any]) -> str:
    values = {row["name"]: row["value"] for row in found["rows"]}
    lines = ["| op, bf16 | ms | achieved | of the ceiling |", "|---|---|---|---|"]
    for row in found["rows"]:
        share = row["value"] / values[CEILINGS[row["unit"]]]
        lines.append(f"| {row['name']} | {row['ms']:.4f} | {row['value']:.2f} {row['unit']} | {share:.0%} |")
    about = f"{found['device']}, torch {found['torch']}, Triton {found['triton']}"
    return "\n".join([*lines, "", f"{about}. Written by `tests/bench/kernel_table.py`."])


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "kernels-h100.json"
    page = DOCS / "README.md"
    head, rest = page.read_text(encoding="utf-8").split(BEGIN, 1)
    text = table(json.loads(source.read_text(encoding="utf-8")))
    page.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
