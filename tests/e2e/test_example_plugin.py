"""The guide's plugin for a family that the core has never heard of: installed by pip, it passes the whole kit."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs/examples/mm-plugin-qwen2audio"
SOURCES = sorted((EXAMPLE / "src").rglob("*.py"))
PUBLIC = {"types", "errors", "hookspecs", "media", "layers", "towers", "decoders", "kernels", "testing"}


def imports(path: Path) -> set[str]:
    """Modules that a file imports from, whole names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_it_is_short_and_uses_public_rooms_only() -> None:
    lines = [line for path in SOURCES for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) < 250
    for path in SOURCES:
        for name in imports(path):
            assert not name.startswith(("mm_plugin_", "transformers")) or name.startswith("mm_plugin_qwen2audio"), name
            if name.startswith("mm_core"):
                assert name.partition(".")[2].split(".")[0] in PUBLIC, f"{path.name} imports {name}"


def test_the_core_has_never_heard_of_the_family() -> None:
    named = [
        path.relative_to(ROOT).as_posix()
        for folder in ("core/src", *(p.as_posix() for p in (ROOT / "plugins").glob("*/src")))
        for path in (ROOT / folder).rglob("*.py")
        if re.search("qwen2.?audio", path.read_text(encoding="utf-8"), re.IGNORECASE)
    ]
    assert named == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip installed it, built from a copy: the source stays as it is."""
    home = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, home / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps",
           "--no-build-isolation", "--no-index", "--target", str(home / "site"), str(home / "source")]  # fmt: skip
    subprocess.run(pip, check=True, capture_output=True, timeout=300)
    return home / "site"


def call(site: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=site.parent / "source", env=env, capture_output=True, text=True, timeout=280
    )


@pytest.mark.slow
def test_it_is_found_by_its_entry_point(site: Path) -> None:
    done = call(site, "-m", "mm_core.cli", "plugins")
    assert done.returncode == 0, done.stderr
    assert re.search(r"qwen2audio\s.*Qwen2AudioForConditionalGeneration", done.stdout.replace("\n", " "))


@pytest.mark.slow
def test_it_passes_the_conformance_kit(site: Path) -> None:
    done = call(site, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "-rA", "tests")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout
    for rung in ("parity-two sounds", "parity-whole window", "order-two sounds", "chunked-audio", "bad_inputs"):
        assert f"PASSED tests/test_conformance.py::TestQwen2Audio::test_rung[{rung}]" in done.stdout
