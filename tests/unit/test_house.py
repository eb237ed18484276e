"""What the architecture promises about the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mm_core

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path for folder in ("core/src", "plugins") for path in (ROOT / folder).rglob("*.py") if "tests" not in path.parts
)
MAX_FILE, MAX_FUNCTION, MAX_INIT = 400, 60, 40


def loaded_after(statement: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter holds after a statement."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    ["mm_core", "mm_core.scheduler", "mm_core.cache", "mm_core.types", "mm_core.config", "mm_core.hookspecs",
     "mm_core.plugins", "mm_core.cli"],
)  # fmt: skip
def test_imports_without_torch(module):
    loaded = loaded_after(f"import {module}")
    assert "mm_core" in loaded
    assert not loaded & {"torch", "transformers", "triton"}


def test_families_are_told_without_torch():
    loaded = loaded_after("from mm_core.plugins import PluginRegistry; PluginRegistry().describe()")
    assert not loaded & {"torch", "transformers", "triton"}


def test_public_names():
    assert mm_core.__all__ == [
        "AsyncEngine", "BatchError", "CacheEvent", "CacheLookup", "CacheStats", "CompletionOutput", "Engine",
        "EngineConfig", "KvCacheConfig", "LevelStats", "MMError", "RequestOutput", "SamplingParams",
        "StructuredOutput", "TextPrompt",
        "__version__", "hookimpl",
    ]  # fmt: skip
    for name in mm_core.__all__:
        assert getattr(mm_core, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = mm_core.absent


def first_line(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Where counting begins. A kernel's counts from its body: one argument a line is no complexity."""
    kernel = any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)
    return function.body[1 if ast.get_docstring(function) else 0].lineno if kernel else function.lineno


def test_sizes():
    faults = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        limit = MAX_INIT if path.name == "__init__.py" else MAX_FILE
        if (lines := len(text.splitlines())) > limit:
            faults.append(f"{path.relative_to(ROOT)}: {lines} lines, the limit is {limit}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - first_line(node) + 1
                if length > MAX_FUNCTION:
                    faults.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has {length} lines")
    assert not faults, "\n".join(faults)


def test_the_limits_see_something():
    assert len(SOURCES) > 20


def test_no_pickle_and_no_remote_code():
    """Nothing loads pickles or lets a checkpoint's own Python run (security rules 18 and 19)."""
    forbidden_calls = {"torch.load", "pickle.load", "pickle.loads", "joblib.load", "eval", "exec"}
    faults = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in forbidden_calls:
                faults.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node.func)}")
            elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                    faults.append(f"{path.relative_to(ROOT)}:{node.value.lineno}: trust_remote_code")
            elif isinstance(node, ast.Import) and {alias.name for alias in node.names} & {"pickle", "dill"}:
                faults.append(f"{path.relative_to(ROOT)}:{node.lineno}: imports pickle")
    assert not faults, "\n".join(faults)
