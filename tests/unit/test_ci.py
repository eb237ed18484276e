"""The workspace's own pytest settings: what nobody ran does not pass in CI."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = """
import pytest

def test_passes(): pass

@pytest.mark.xfail(reason="known")
def test_expected(): raise AssertionError

@pytest.mark.skip(reason="no such thing here")
def test_skipped(): pass

@pytest.mark.gpu
def test_needs_a_gpu(): raise AssertionError
"""


def run_pytest(folder: Path, **env: str) -> tuple[int, str]:
    (folder / "conftest.py").write_text((ROOT / "conftest.py").read_text())
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    base = {key: value for key, value in os.environ.items() if key != "CI"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(folder)]
    done = subprocess.run(command, cwd=folder, env=base | env, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout


@pytest.mark.slow
def test_skips_fail_in_ci_and_markers_deselect(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    code, out = run_pytest(tmp_path)
    assert code == 0
    assert "1 passed, 1 skipped, 1 deselected, 1 xfailed" in out.splitlines()[-1]
    code, out = run_pytest(tmp_path, CI="true")
    assert code == 1
    assert "1 passed, 1 deselected, 1 xfailed, 1 error" in out.splitlines()[-1]
    assert "no such thing here" in out


@pytest.mark.slow
def test_a_module_that_skips_itself_fails_in_ci(tmp_path):
    (tmp_path / "test_one.py").write_text("import pytest\npytest.skip('no file', allow_module_level=True)\n")
    (tmp_path / "test_two.py").write_text("import pytest\npytest.importorskip('no_such')\n")
    code, out = run_pytest(tmp_path, CI="1")
    assert code != 0
    assert "2 errors" in out.splitlines()[-1]
