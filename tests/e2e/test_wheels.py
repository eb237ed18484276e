"""What a user installs: every package's wheel, in a clean environment, found and answering."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = [ROOT / "core", *sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))]
ZOO_MODEL = ROOT / "zoo" / "qwen2vl-nano"


def call(*command: object, cwd: Path, **env: str) -> str:
    """Run a command far from the checkout, with nothing of it on the path."""
    base = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MM_ZOO", "TRITON_INTERPRET", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**base, **env}, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> list[Path]:
    out = tmp_path_factory.mktemp("wheels")
    for package in PACKAGES:
        call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, package, cwd=out)
    found = sorted(out.glob("*.whl"))
    assert len(found) == len(PACKAGES)
    return found


@pytest.fixture(scope="module")
def installed(wheels, tmp_path_factory) -> Path:
    """bin/ of an environment that holds the wheels and their dependencies, nothing of the checkout."""
    home = tmp_path_factory.mktemp("clean")
    venv.create(home / "venv", with_pip=True)
    scripts = home / "venv" / "bin"
    pip = [scripts / "python", "-m", "pip", "--disable-pip-version-check", "-q", "install"]
    call(*pip, "-c", ROOT / "constraints-dev.txt", *wheels, cwd=home)
    return scripts


def test_wheels_hold_the_package_and_nothing_else(wheels):
    for wheel in wheels:
        names = zipfile.ZipFile(wheel).namelist()
        tops = {name.split("/")[0] for name in names}
        assert len(tops) == 2, tops
        assert any(name.endswith("/py.typed") for name in names), wheel.name
        assert not [name for name in names if "test_" in name or name.endswith(".safetensors")]


def test_plugins_are_found_by_entry_point(installed, tmp_path):
    rows = json.loads(call(installed / "mm", "plugins", "--json", cwd=tmp_path))
    by_name = {row["name"]: row for row in rows}
    assert set(by_name) == {package.name for package in PACKAGES[1:]}
    for row in rows:
        assert row["error"] is None
        assert row["architectures"]
        assert row["distribution"] == f"mm-plugin-{row['name']}"
    qwen = by_name["qwen2vl"]
    assert "Qwen2VLForConditionalGeneration" in qwen["architectures"]
    assert {"mm_families", "mm_processor", "mm_encoder", "mm_fusion"} <= set(qwen["hooks"])


def test_env_and_a_wrong_model(installed, tmp_path):
    facts = json.loads(call(installed / "mm", "env", "--json", cwd=tmp_path))
    assert facts["torch"].startswith("2.")
    done = subprocess.run([installed / "mm", "run", "./absent", "hi"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("mm: error: Checkpoint directory './absent' does not exist.")


def test_run_answers_with_the_zoo_model(installed, tmp_path):
    from PIL import Image, ImageDraw

    # Without the model the repository is not whole: that is a failure, not a reason to skip.
    assert (ZOO_MODEL / "config.json").is_file(), "zoo/qwen2vl-nano is missing"
    image = Image.new("RGB", (112, 112), "white")
    ImageDraw.Draw(image).ellipse((30, 30, 80, 80), fill="red")
    image.save(tmp_path / "red.png")
    command = [
        installed / "mm",
        "run",
        "What colour is the circle?",
        "--image",
        tmp_path / "red.png",
        "--max-tokens",
        "16",
    ]
    answer = call(*command, cwd=tmp_path, MM_ZOO=str(ROOT / "zoo"))
    assert "red" in answer.lower()
