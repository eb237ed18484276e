"""Discovery of plugins, the contract's checks, and who owns a model."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from types import ModuleType, SimpleNamespace

import pytest

from mm_core import hookimpl
from mm_core.errors import CheckpointError, PluginConflictError, PluginError, UnsupportedModelError
from mm_core.hookspecs import DecoderSpec, WeightMap
from mm_core.plugins import OFFICIAL, PluginRegistry
from mm_core.types import ModelFamily


def plugin(name: str, *architectures: str, **hooks) -> ModuleType:
    """A module with mm_families and whatever hooks are given, all marked."""
    module = ModuleType(name)
    families = [ModelFamily(name, architectures or (f"{name}Model",), ("image",))]
    module.mm_families = hookimpl(lambda: families)
    for hook, function in hooks.items():
        setattr(module, hook, hookimpl(function))
    return module


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Makes an entry point, with a distribution behind it, of a module or of source text."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name: str, what: ModuleType | str, version: str = "1.0") -> EntryPoint:
        module = f"plugin_{name}_{version.replace('.', '_')}"
        monkeypatch.delitem(sys.modules, module, raising=False)
        if isinstance(what, str):
            (tmp_path / f"{module}.py").write_text(what)
        else:
            monkeypatch.setitem(sys.modules, module, what)
        entry = EntryPoint(name, module, "mm_core")
        vars(entry)["dist"] = SimpleNamespace(name=f"mm-plugin-{name}", version=version)
        return entry

    return make


def registry(*plugins, installed=()) -> PluginRegistry:
    return PluginRegistry(plugins, installed=installed)


def test_an_installed_plugin_is_found_and_described(install):
    found = registry(installed=[install("a", plugin("a", "AModel", mm_fusion=lambda family: None), "0.2")])
    (info,) = found.describe()
    assert (info.name, info.distribution, info.version, info.error) == ("a", "mm-plugin-a", "0.2", None)
    assert (info.families, info.architectures, info.modalities) == (("a",), ("AModel",), ("image",))
    assert info.hooks == ("mm_families", "mm_fusion")
    owner = found.resolve(["Unknown", "AModel"])
    assert (owner.plugin, owner.family.name) == ("a", "a")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import no_such_module", "ModuleNotFoundError"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit"),
        ("from mm_core import hookimpl\n@hookimpl\ndef mm_families(): raise RuntimeError('boom')", "boom"),
        ("from mm_core import hookimpl\n@hookimpl\ndef mm_families(): return None", "returned None"),
        ("def mm_families(): return []", "no @hookimpl"),
        ("x = 1", "implements no mm_families"),
    ],
)
def test_a_broken_installed_plugin_stops_nobody(install, source, says):
    found = registry(installed=[install("bad", source), install("good", plugin("good", "GoodModel"))])
    bad, good = found.describe()
    assert good.error is None
    assert says in bad.error
    assert found.resolve(["GoodModel"]).plugin == "good"
    with pytest.raises(UnsupportedModelError) as caught:
        found.resolve(["BadModel"], model="x/y")
    assert "(installed: good 1.0). Failed to load: bad 1.0 (" in str(caught.value)
    assert says in str(caught.value)
    with pytest.raises(PluginError, match="failed to load"):
        registry("bad", installed=[install("bad", source)])


def test_unsupported_architecture_names_the_remedy(install):
    found = registry(installed=[install("whisper", plugin("whisper"), "0.2")])
    with pytest.raises(UnsupportedModelError) as caught:
        found.resolve(["LlavaForConditionalGeneration"], model="x/y")
    assert str(caught.value) == (
        "Model 'x/y' has architecture 'LlavaForConditionalGeneration'. No installed plugin supports it "
        "(installed: whisper 0.2). Run `pip install mm-plugin-llava`."
    )
    with pytest.raises(UnsupportedModelError, match=r"none is installed.*plugins=\[\.\.\.\]"):
        registry().resolve(["Nobody"])
    assert set(OFFICIAL) == {"qwen2vl", "llava", "nvila", "blip2", "whisper", "nougat"}


def test_two_plugins_claim_one_architecture(install):
    a, b = install("a", plugin("a", "Same"), "1.0"), install("b", plugin("b", "Same"), "2.0")
    found = registry(installed=[a, b])
    with pytest.raises(PluginConflictError, match=r"'a' \(mm-plugin-a 1\.0\) and 'b' \(mm-plugin-b 2\.0\).*Pick"):
        found.resolve(["Same"])
    assert found.resolve(["Same"], family="b").plugin == "b"
    assert found.resolve(["Same"], family="mm-plugin-a").plugin == "a"
    with pytest.raises(UnsupportedModelError, match="called 'c'"):
        found.resolve(["Same"], family="c")
    # Naming one, or handing one over, is picking it.
    assert registry("b", installed=[a, b]).resolve(["Same"]).plugin == "b"
    assert registry(plugin("mine", "Same"), installed=[a, b]).resolve(["Same"]).plugin == "mine"
    with pytest.raises(PluginConflictError, match="'mine' and 'other'"):
        registry(plugin("mine", "Same"), plugin("other", "Same"), installed=[a]).resolve(["Same"])


def test_name_conflicts(install):
    with pytest.raises(PluginConflictError, match=r"called 'a': 'a' \(mm-plugin-a 1\.0\) and 'a' \(mm-plugin-a 2\.0\)"):
        registry(installed=[install("a", plugin("a"), "1.0"), install("a", plugin("a"), "2.0")])
    with pytest.raises(PluginConflictError, match="called 'a'"):
        registry(plugin("a"), plugin("a"))
    same = plugin("a")
    assert [info.name for info in registry(same, same).describe()] == ["a"]
    installed = install("a", same)
    assert registry(same, installed=[installed]).resolve(["aModel"]).plugin == "a"
    with pytest.raises(PluginError, match=r"no such plugin is installed \(none is installed\)"):
        registry("absent")


class Instance:
    @hookimpl
    def mm_families(self):
        return [ModelFamily("inst", ("InstModel",), ("image", "video"))]

    @hookimpl
    def mm_fusion(self, checkpoint):
        return SimpleNamespace(kind="embed", positions=lambda ids, ranges: None)


def test_an_object_is_a_plugin_and_a_class_is_not():
    found = registry(Instance())
    assert (
        found.call_owner("mm_fusion", found.resolve(["InstModel"]), family="inst", checkpoint=None, context=None).kind
        == "embed"
    )
    with pytest.raises(PluginError, match=r"is a class. Give an instance, `Instance\(\)`"):
        registry(Instance)


def test_contract_faults_name_plugin_hook_and_signature():
    def unmarked(family, checkpoint, context): ...

    with pytest.raises(PluginError, match=r"'p': mm_procesor\(family\) is no hook.*Did you mean mm_processor\(family"):
        registry(plugin("p", mm_procesor=lambda family: None))
    with pytest.raises(PluginError, match=r"'p': render\(family\) is no hook"):
        registry(plugin("p", render=lambda family: None))
    module = plugin("p")
    module.mm_fusion = unmarked
    with pytest.raises(PluginError, match=r"'p': mm_fusion\(family, checkpoint, context\) has no @hookimpl"):
        registry(module)
    module = plugin("p")
    module.mm_fuzion = unmarked
    with pytest.raises(PluginError, match=r"Did you mean mm_fusion\("):
        registry(module)
    with pytest.raises(
        PluginError, match=r"takes 'ckpt', which.*signature is mm_fusion\(family, checkpoint, context\)"
    ):
        registry(plugin("p", mm_fusion=lambda family, ckpt: None))


@pytest.mark.parametrize(
    ("families", "says"),
    [
        (None, "returned None"),
        ([], r"returned \[\]"),
        (["x"], "takes ModelFamily"),
        (
            [ModelFamily("x", ("X",), ("image",), api_version=99)],
            r"version 99 .* speaks version 1\. Update the mm-core",
        ),
        ([ModelFamily("x", ("X",), ("image",), api_version=0)], "Update the plugin"),
        ([ModelFamily("x", (), ("image",))], "architectures=()"),
        ([ModelFamily("x", "X", ("image",))], "architectures='X'"),
        ([ModelFamily("x", ("X",), ("smell",))], "modalities"),
    ],
)
def test_families_are_checked(families, says):
    module = ModuleType("p")
    module.mm_families = hookimpl(lambda: families)
    with pytest.raises(PluginError, match=says):
        registry(module)


def test_only_the_owner_is_called():
    calls = []

    def fusion(name):
        return lambda family, checkpoint: (
            calls.append((name, family, checkpoint)) or SimpleNamespace(kind="embed", positions=None)
        )

    found = registry(plugin("a", mm_fusion=fusion("a")), plugin("b", mm_fusion=fusion("b")))
    found.call_owner("mm_fusion", found.resolve(["aModel"]), family="a", checkpoint=7, context=None)
    assert calls == [("a", "a", 7)]


def decoder_spec() -> DecoderSpec:
    return DecoderSpec(build=lambda context: None, weight_map=WeightMap(rename=()), max_model_len=8)


def test_the_decoder_is_the_owners_then_cores():
    default = ModuleType("default")
    mine, cores = decoder_spec(), decoder_spec()
    default.mm_decoder = hookimpl(lambda family, checkpoint: cores)
    arguments = {"default": default, "family": "f", "checkpoint": None}
    for own, want in (({}, cores), ({"mm_decoder": lambda: None}, cores), ({"mm_decoder": lambda: mine}, mine)):
        found = registry(plugin("p", **own))
        assert found.call_owner("mm_decoder", found.resolve(["pModel"]), **arguments) is want


@pytest.mark.parametrize(
    ("hook", "given", "says"),
    [
        ("mm_processor", None, "returned None. It must return a Processor"),
        ("mm_processor", object(), "returned object without .*tokenizer.*prepare"),
        ("mm_fusion", SimpleNamespace(kind="mix", positions=None), "returned SimpleNamespace with kind='mix'"),
        ("mm_encoder", SimpleNamespace(), "returned SimpleNamespace without hidden_size, weight_map, cost, __call__"),
        ("mm_decoder", {"build": 1}, "returned dict. It must return a DecoderSpec"),
    ],
)
def test_what_a_hook_gives_is_checked(hook, given, says):
    found = registry(plugin("p", **{hook: lambda: given}))
    arguments = {"family": "f", "checkpoint": None} | ({"context": None} if hook in ("mm_encoder", "mm_fusion") else {})
    with pytest.raises(PluginError, match=rf"Plugin 'p': {hook}\(.*\) {says}"):
        found.call_owner(hook, found.resolve(["pModel"]), **arguments)


def test_a_hook_that_is_not_there_or_raises():
    def broken(family):
        raise KeyError("vision_config")

    def refuses(family):
        raise CheckpointError("no vision_config")

    found = registry(plugin("p", mm_processor=broken, mm_encoder=refuses))
    owner = found.resolve(["pModel"])
    with pytest.raises(PluginError, match=r"'p': mm_fusion\(family, checkpoint, context\) is not implemented"):
        found.call_owner("mm_fusion", owner, family="f", checkpoint=None, context=None)
    with pytest.raises(PluginError, match=r"mm_processor\(.*\) raised KeyError: 'vision_config'") as caught:
        found.call_owner("mm_processor", owner, family="f", checkpoint=None)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(CheckpointError, match="no vision_config"):
        found.call_owner("mm_encoder", owner, family="f", checkpoint=None, context=None)
