"""What README and docs/ say runs, exists, and is complete."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shlex
import tomllib
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from support.scripts import module_of

import mm_core
from mm_core import KvCacheConfig, MMError, benchspecs, errors, hookspecs
from mm_core.cli import main
from mm_core.engine import cache
from mm_core.plugins import PluginRegistry

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "core/src/mm_core"
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [README, ROOT / "CHANGELOG.md", *DOCS]
OTHERS = [ROOT / "core/README.md", *ROOT.glob("plugins/*/README.md"), *ROOT.glob("zoo/**/README.md")]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


# --- what runs


@pytest.mark.parametrize("page", [README, ROOT / "docs/quickstart.md", ROOT / "docs/cache-api.md"], ids=name_of)
def test_python_examples_run(page, capsys):
    code = blocks(page, "python")
    assert code
    exec(compile("\n".join(code), name_of(page), "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.strip()


def test_readme_example_is_short():
    (code,) = blocks(README, "python")
    assert len(code.splitlines()) <= 20


COMMANDS = [line for block in blocks(README, "bash") for line in block.splitlines() if line.startswith("mm ")]


def test_readme_shows_seven_commands():
    assert len(COMMANDS) == 7


@pytest.mark.parametrize("line", [line for line in COMMANDS if "Qwen/" not in line])
def test_commands_run(line, capsys):
    assert main(shlex.split(line)[1:]) == 0
    assert capsys.readouterr().out.strip()


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert named <= targets, name_of(page)


def test_errors_shown_in_the_readme_are_the_real_ones():
    shown = " ".join(README.read_text(encoding="utf-8").split())
    with pytest.raises(MMError) as unsupported:
        PluginRegistry().resolve(["T5ForConditionalGeneration"], model="x/y")
    with pytest.raises(MMError) as incomplete:
        KvCacheConfig(disk_cache_path="/var/cache/kv")
    assert str(unsupported.value) in shown
    assert str(incomplete.value) in shown


# --- what exists


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", t)]
    broken = [target for target in targets if target and not (page.parent / target).exists()]
    assert not broken


def paths_in(text: str) -> set[str]:
    """Words of code that begin with a folder of the workspace or of the package, or name a file at the root."""
    code = [body for _, body in FENCE.findall(text)] + re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    folders = {path.name for base in (ROOT, PACKAGE) for path in base.iterdir() if path.is_dir()}
    words = {word.strip("\"'(),") for part in code for word in part.split()}
    inside = {w for w in words if re.fullmatch(r"[\w.-]+(/[\w.:-]*)+", w) and w.split("/")[0] in folders}
    return inside | {w for w in words if re.fullmatch(r"[\w-]+\.(md|toml|txt|yml)", w)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page):
    missing = []
    for word in sorted(paths_in(page.read_text(encoding="utf-8"))):
        path, _, test = word.partition("::")
        found = next((base / path for base in (ROOT, PACKAGE) if (base / path).exists()), None)
        if found is None or (test and f"def {test}(" not in found.read_text(encoding="utf-8")):
            missing.append(word)
    assert not missing


def test_the_search_for_paths_finds_some():
    assert "tests/unit/test_scheduler.py::test_random_life" in paths_in((ROOT / "docs/architecture.md").read_text())


def test_the_site_has_every_page():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page for page in DOCS if f" {page.relative_to(ROOT / 'docs').as_posix()}\n" not in nav] == []


def test_changelog_and_licence():
    assert f"## {mm_core.__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


# --- what is complete


def test_support_table_is_up_to_date():
    text = README.read_text(encoding="utf-8")
    assert module_of(ROOT / "docs/support_table.py").updated(text) == text, "run: python docs/support_table.py --write"


def signature(function: object) -> str:
    arguments = [name for name in inspect.signature(function).parameters if name != "self"]
    return f"`{function.__name__}({', '.join(arguments)})`"


def test_every_hook_is_documented():
    page = (ROOT / "docs/hooks.md").read_text(encoding="utf-8")
    hooks = [value for name, value in vars(hookspecs.HookSpecs).items() if name.startswith("mm_")]
    assert len(hooks) >= 5
    assert [signature(hook) for hook in hooks if signature(hook) not in page] == []


@pytest.mark.parametrize("protocol", ["Checkpoint", "Processor", "Encoder", "Fusion", "Decoder"])
def test_every_protocol_method_is_documented(protocol):
    page = (ROOT / "docs/hooks.md").read_text(encoding="utf-8")
    kind = getattr(hookspecs, protocol)
    public = {n: v for n, v in vars(kind).items() if not n.startswith("_") or n == "__call__"}
    methods = [signature(value) for value in public.values() if inspect.isfunction(value)]
    properties = [name for name, value in public.items() if isinstance(value, property)]
    values = [f"`{name}`" for name in (*inspect.get_annotations(kind), *properties)]
    assert methods or values
    assert f"**`{protocol}`**" in page
    assert [text for text in (*methods, *values) if text not in page] == []


@pytest.mark.parametrize(
    "name",
    ["BuildContext", "WeightMap", "MediaRequest", "SamplingDefaults", "KVCacheSpec", "DecoderSpec", "BenchFamily",
     "BenchPrompt", "BenchModel", "BenchWorkload", "BenchDecoder"],
)  # fmt: skip
def test_every_field_of_the_contract_is_documented(name):
    page = (ROOT / "docs/hooks.md").read_text(encoding="utf-8")
    assert f"`{name}`" in page
    home = benchspecs if name.startswith("Bench") else hookspecs
    assert [f.name for f in dataclasses.fields(getattr(home, name)) if f"`{f.name}`" not in page] == []


def test_every_call_of_the_cache_is_documented_and_its_types_can_be_imported():
    page = (ROOT / "docs/cache-api.md").read_text(encoding="utf-8")
    calls = {n: v for n, v in vars(cache.CacheControl).items() if inspect.isfunction(v) and not n.startswith("_")}
    assert len(calls) >= 9
    assert [name for name in calls if f"`{name}(" not in page] == []
    assert calls.keys() <= vars(cache.AsyncCacheControl).keys()
    listener = get_type_hints(cache.CacheControl.subscribe)["listener"]
    told = {"lookup": "CacheLookup", "stats": "CacheStats", "pin": "Pinned", "evict": "Evicted", "clear": "Evicted"}
    found = {name: get_type_hints(calls[name])["return"] for name in told}
    found |= {"listener": get_args(listener)[0][0], "level": get_type_hints(cache.CacheStats)["host"]}
    for name, wanted in {**told, "listener": "CacheEvent", "level": "LevelStats"}.items():
        assert found[name] is getattr(mm_core if wanted in mm_core.__all__ else cache, wanted)
        assert f"`{wanted}`" in page


def error_classes() -> list[type[MMError]]:
    return [v for v in vars(errors).values() if inspect.isclass(v) and issubclass(v, MMError)]


def test_every_error_is_documented_with_its_code():
    page = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    wanted = {(error.__name__, error.code) for error in error_classes()}
    assert set(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", page, re.MULTILINE)) == wanted


def test_the_error_tree_is_the_real_one():
    (tree,) = blocks(ROOT / "docs/errors.md", "text")
    parents: list[str] = []
    drawn = {}
    for line in tree.splitlines():
        name = line.strip("│├└─ ")
        depth = (len(line) - len(name)) // 4
        parents[depth:] = [name]
        drawn[name] = parents[depth - 1] if depth else ""
    real = {error.__name__: error.__mro__[1].__name__ for error in error_classes()}
    assert drawn == {**real, "MMError": ""}


def requirement(text: str) -> str:
    return re.split(r"[\s<>=!~;\[]", text.strip(), maxsplit=1)[0]


def test_every_dependency_has_its_reason():
    texts: list[str] = []
    for file in (ROOT / "core/pyproject.toml", *ROOT.glob("plugins/*/pyproject.toml")):
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        texts += project["dependencies"]
        texts += [text for extra in project.get("optional-dependencies", {}).values() for text in extra]
    for name in ("requirements-dev.txt", "requirements-docs.txt"):
        texts += [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if line[:1] not in ("", "#")]
    page = (ROOT / "docs/dependencies.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)) == {requirement(text) for text in texts}
