"""`mm new-plugin`: exactly these files, and they install and pass the conformance kit as they are."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mm_core.cli import main

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    "README.md",
    "pyproject.toml",
    "src/mm_plugin_fable/__init__.py",
    "src/mm_plugin_fable/encoder.py",
    "src/mm_plugin_fable/fusion.py",
    "src/mm_plugin_fable/processor.py",
    "src/mm_plugin_fable/py.typed",
    "tests/test_conformance.py",
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("new")
    assert main(["new-plugin", "fable", "--directory", str(directory)]) == 0
    return directory / "mm-plugin-fable"


def test_exactly_these_files(written: Path) -> None:
    assert sorted(p.relative_to(written).as_posix() for p in written.rglob("*") if p.is_file()) == FILES
    for path in written.rglob("*"):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert "$" not in text, f"{path.name}: a name was not filled in"
            assert "smallest" not in text.lower()
            if path.suffix == ".py":
                ast.parse(text)


def test_what_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-plugin", "fable", "--directory", str(tmp_path)]) == 0
    assert f"pip install -e '{tmp_path / 'mm-plugin-fable'}[test]'" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["Fable", "2fable", "my-fable", "my_fable", "", "../fable", "fäble"])
def test_names_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["new-plugin", name, "--directory", str(tmp_path)]) == 1
    assert "lower-case letters and digits" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-plugin", "fable", "--directory", str(written.parent)]) == 1
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize("tool", [["ruff", "check", "--isolated", "--line-length=120", "--no-cache"],
                                  ["ruff", "format", "--isolated", "--check", "--line-length=120"]])  # fmt: skip
def test_the_code_is_tidy(written: Path, tool: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *tool, str(written)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_it_installs_and_passes_the_kit(written: Path, tmp_path: Path) -> None:
    """pip builds and installs it; pytest, started in its folder, finds the plugin by its entry point."""
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps",
           "--no-build-isolation", "--no-index", "--target", str(site), str(written)]  # fmt: skip
    subprocess.run(pip, check=True, capture_output=True, timeout=300)
    env = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "tests"]
    done = subprocess.run(command, cwd=written, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout
    code = (
        "from mm_core.plugins import PluginRegistry\n"
        "print([info.version for info in PluginRegistry().describe() if info.name == 'fable'])"
    )
    told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert told.stdout.strip() == "['0.1.0']", told.stderr
