"""Finding plugins, checking that they keep the contract, and calling the one that owns a model.

An installed plugin that fails is kept with its error and stops nobody else; one that the caller
hands over in `plugins=[...]` raises at once.
"""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from mm_core.errors import MMError, PluginConflictError, PluginError, UnsupportedModelError
from mm_core.hookspecs import API_VERSION, PROJECT, DecoderSpec, HookSpecs, Processor
from mm_core.types import MODALITIES, ModelFamily

_log = logging.getLogger(__name__)

# Families the project itself publishes: what to suggest for an architecture nobody claims.
OFFICIAL: Mapping[str, tuple[str, ...]] = {
    "qwen2vl": ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "LlavaOnevisionForConditionalGeneration",
    ),
    "nvila": (
        "LlavaLlamaModel",
        "NVILAForConditionalGeneration",
        "NVILALiteForConditionalGeneration",
        "VILAForConditionalGeneration",
    ),
    "blip2": ("Blip2ForConditionalGeneration", "InstructBlipForConditionalGeneration"),
    "whisper": ("WhisperForConditionalGeneration",),
    "nougat": ("VisionEncoderDecoderModel",),
}
_FUSION_KINDS = ("embed", "cross_attention", "encoder_decoder")


@dataclass(frozen=True)
class PluginInfo:
    """One plugin as `mm plugins` lists it. `error` says why it is not used, or is None.

    given: handed over in `plugins=[...]`, by object or by name; such plugins win over installed ones.
    """

    name: str
    distribution: str | None = None
    version: str | None = None
    families: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()
    hooks: tuple[str, ...] = ()
    error: str | None = None
    given: bool = False

    @property
    def label(self) -> str:
        """Name, and the version where it is known: "whisper 0.2"."""
        return f"{self.name} {self.version}" if self.version else self.name


@dataclass(frozen=True)
class Owner:
    """The plugin that serves a checkpoint, and the family of it."""

    plugin: str
    family: ModelFamily


class PluginRegistry:
    """All plugins of this process.

    plugins: modules or objects that implement hooks and need not be packaged, or names (str) of
    installed plugins; they are preferred where an installed plugin claims the same architecture.
    installed: entry points to load; None takes those of the group `mm_core`.
    """

    def __init__(self, plugins: Sequence[object] = (), *, installed: Iterable[EntryPoint] | None = None) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(HookSpecs)
        self._infos: dict[str, PluginInfo] = {}
        self._families: dict[str, tuple[ModelFamily, ...]] = {}
        found = entry_points(group=PROJECT) if installed is None else installed
        for entry in sorted(found, key=lambda entry: entry.name):
            self._add_installed(entry)
        for plugin in plugins:
            self._add_given(plugin)

    def describe(self) -> list[PluginInfo]:
        """One row a plugin, failed ones included, by name."""
        return [self._infos[name] for name in sorted(self._infos)]

    def resolve(self, architectures: Sequence[str], *, model: str = "", family: str | None = None) -> Owner:
        """The plugin that serves the first of `architectures` that any plugin claims.

        family: picks a family, plugin or distribution by name where several claim it.
        Raises UnsupportedModelError where nobody does, PluginConflictError where several do.
        """
        for architecture in architectures:
            claims = [
                Owner(name, claimed)
                for name in sorted(self._families)
                for claimed in self._families[name]
                if architecture in claimed.architectures
            ]
            if family is not None:
                claims = [claim for claim in claims if family in self._names(claim)]
            claims = [claim for claim in claims if self._infos[claim.plugin].given] or claims
            if len(claims) > 1:
                raise self._conflict(architecture, claims)
            if claims:
                return claims[0]
        raise self._unsupported(architectures, model, family)

    def owners(self, hook: str) -> list[Owner]:
        """Every family whose plugin implements a hook, by the plugin's name."""
        names = [info.name for info in self.describe() if hook in info.hooks]
        return [Owner(name, family) for name in names for family in self._families[name]]

    def implements(self, hook: str, owner: Owner) -> bool:
        """Whether the owner has a hook that not every family needs."""
        return hook in self._infos[owner.plugin].hooks

    def call_owner(self, hook: str, owner: Owner, *, default: object | None = None, **arguments: Any) -> Any:
        """Call one hook of the owner, then of `default` (a module with core's own implementation).

        PluginError names plugin and hook when nobody implements it, when it raises anything but
        an MMError, and when what it gives is not what the contract says.
        """
        others = [p for name, p in self._manager.list_name_plugin() if name != owner.plugin]
        result = self._guarded(owner.plugin, hook, self._manager.subset_hook_caller(hook, others), arguments)
        if result is None and default is not None:
            result = self._guarded("mm-core", hook, getattr(default, hook), arguments)
        if result is None:
            what = "returned None" if hook in self._infos[owner.plugin].hooks else "is not implemented"
            raise PluginError(f"Plugin '{owner.plugin}': {_spec_text(hook)} {what}. {_wanted(hook)}")
        if (fault := _fault(hook, result)) is not None:
            raise PluginError(f"Plugin '{owner.plugin}': {_spec_text(hook)} {fault}. {_wanted(hook)}")
        return result

    def _guarded(self, plugin: str, hook: str, call: Any, arguments: Mapping[str, Any]) -> Any:
        try:
            return call(**arguments)
        except MMError:
            raise
        except Exception as error:
            raise PluginError(
                f"Plugin '{plugin}': {_spec_text(hook)} raised {type(error).__name__}: {error}. "
                "Update the plugin, or report this to its author."
            ) from error

    def _add_installed(self, entry: EntryPoint) -> None:
        dist = entry.dist
        info = PluginInfo(entry.name, dist.name if dist else None, dist.version if dist else None)
        if (known := self._infos.get(entry.name)) is not None:
            raise PluginConflictError(
                f"Two plugins are called '{entry.name}': {_origin(known)} and {_origin(info)}. Uninstall one of them."
            )
        self._infos[entry.name] = info
        # SystemExit too: a plugin that calls sys.exit on import must not end the host.
        try:
            self._register(entry.name, entry.load())
        except (Exception, SystemExit) as error:
            text = str(error) if isinstance(error, MMError) else f"{type(error).__name__}: {error}"
            self._infos[entry.name] = replace(info, error=text)
            _log.warning("plugin '%s' is not used: %s", info.label, text)

    def _add_given(self, plugin: object) -> None:
        if isinstance(plugin, str):
            self._prefer(plugin)
            return
        known = self._manager.get_name(plugin)
        name = known or getattr(plugin, "__name__", None) or type(plugin).__name__
        if known is None:
            if name in self._infos:
                raise PluginConflictError(
                    f"Two plugins are called '{name}': {_origin(self._infos[name])} and the one in plugins=[...]. "
                    "Rename one of them, or uninstall the other."
                )
            self._infos[name] = PluginInfo(name)
            self._register(name, plugin)
        self._infos[name] = replace(self._infos[name], given=True)

    def _prefer(self, name: str) -> None:
        for info in self._infos.values():
            if name in (info.name, info.distribution):
                if info.error is not None:
                    raise PluginError(f"Plugin '{name}' of plugins=[...] failed to load: {info.error}")
                self._infos[info.name] = replace(info, given=True)
                return
        raise PluginError(f"plugins=[{name!r}]: no such plugin is installed ({self._installed_text()}).")

    def _register(self, name: str, plugin: object) -> None:
        """Check a plugin and make it known; raises PluginError and leaves nothing behind if it is wrong."""
        hooks = _checked_hooks(self._manager, name, plugin)
        self._manager.register(plugin, name=name)
        try:
            impls = self._manager.hook.mm_families.get_hookimpls()
            families = _checked_families(name, next(i.function() for i in impls if i.plugin is plugin))
        except BaseException:
            self._manager.unregister(name=name)
            raise
        self._families[name] = families
        self._infos[name] = replace(
            self._infos[name],
            families=tuple(f.name for f in families),
            architectures=tuple(a for f in families for a in f.architectures),
            modalities=tuple(m for m in MODALITIES if any(m in f.modalities for f in families)),
            hooks=hooks,
        )

    def _names(self, claim: Owner) -> tuple[str | None, ...]:
        return claim.family.name, claim.plugin, self._infos[claim.plugin].distribution

    def _installed_text(self) -> str:
        labels = [info.label for info in self.describe() if info.error is None]
        return f"installed: {', '.join(labels)}" if labels else "none is installed"

    def _conflict(self, architecture: str, claims: Sequence[Owner]) -> PluginConflictError:
        origins = " and ".join(_origin(self._infos[claim.plugin]) for claim in claims)
        return PluginConflictError(
            f"Architecture '{architecture}' is claimed by {len(claims)} plugins: {origins}. Pick one with "
            f"plugins=['{claims[0].plugin}'] (Engine.from_pretrained), or uninstall the other."
        )

    def _unsupported(self, architectures: Sequence[str], model: str, family: str | None) -> UnsupportedModelError:
        shown = " or ".join(f"'{a}'" for a in architectures) or "none"
        who = f"Model '{model}'" if model else "The model"
        picked = f" called '{family}'" if family is not None else ""
        text = f"{who} has architecture {shown}. No installed plugin{picked} supports it ({self._installed_text()})."
        if failed := [info for info in self.describe() if info.error is not None]:
            text += f" Failed to load: {'; '.join(f'{info.label} ({info.error})' for info in failed)}."
        official = [name for name, known in OFFICIAL.items() if set(known) & set(architectures)]
        if official and not any(info.name == official[0] for info in failed):
            return UnsupportedModelError(f"{text} Run `pip install mm-plugin-{official[0]}`.")
        return UnsupportedModelError(
            f"{text} Install the plugin of its family, or hand one over: Engine.from_pretrained(..., plugins=[...])."
        )


def _origin(info: PluginInfo) -> str:
    where = f" ({info.distribution} {info.version})" if info.distribution else ""
    return f"'{info.name}'{where}"


def _spec_text(hook: str) -> str:
    """A hook with its arguments as a plugin writes them: "mm_fusion(family, checkpoint)"."""
    return f"{hook}({', '.join(_spec_arguments(hook))})"


def _spec_arguments(hook: str) -> list[str]:
    return [name for name in inspect.signature(getattr(HookSpecs, hook)).parameters if name != "self"]


def _spec_names() -> list[str]:
    return [name for name in vars(HookSpecs) if name.startswith("mm_")]


def _checked_hooks(manager: pluggy.PluginManager, name: str, plugin: object) -> tuple[str, ...]:
    """Names of the hooks a plugin implements; PluginError for misspelt, unmarked or ill-formed ones."""
    if inspect.isclass(plugin):
        raise PluginError(f"Plugin '{name}' is a class. Give an instance, `{plugin.__name__}()`, or a module.")
    hooks = []
    for attribute in dir(plugin):
        value = inspect.getattr_static(plugin, attribute)
        function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        if not inspect.isroutine(function):
            continue
        options = manager.parse_hookimpl_opts(plugin, attribute)
        if options is None and not attribute.startswith("mm_"):
            continue
        hook = (options["specname"] if options is not None else None) or attribute
        _check_hook(name, hook, getattr(plugin, attribute), marked=options is not None)
        hooks.append(hook)
    if "mm_families" not in hooks:
        raise PluginError(f"Plugin '{name}' implements no mm_families(). Add it: it says which models are served.")
    return tuple(hook for hook in _spec_names() if hook in hooks)


def _check_hook(plugin: str, hook: str, function: Any, *, marked: bool) -> None:
    given = list(inspect.signature(function).parameters)
    shown = f"{hook}({', '.join(given)})"
    if hook not in _spec_names():
        near = difflib.get_close_matches(hook, _spec_names(), n=1)
        hint = f"Did you mean {_spec_text(near[0])}?" if near else f"There are: {', '.join(_spec_names())}."
        raise PluginError(f"Plugin '{plugin}': {shown} is no hook of mm_core. {hint}")
    if not marked:
        raise PluginError(
            f"Plugin '{plugin}': {shown} has no @hookimpl, so it would never be called. "
            "Write `from mm_core import hookimpl` and put @hookimpl above it."
        )
    if unknown := [argument for argument in given if argument not in _spec_arguments(hook)]:
        raise PluginError(
            f"Plugin '{plugin}': {shown} takes {', '.join(map(repr, unknown))}, which the hook does not pass. "
            f"The signature is {_spec_text(hook)}; arguments may be left out, not renamed."
        )


def _checked_families(name: str, families: Any) -> tuple[ModelFamily, ...]:
    """What `mm_families` of one plugin gave, checked."""
    if not isinstance(families, list | tuple) or not families:
        raise PluginError(f"Plugin '{name}': mm_families() returned {families!r}. Return a list of ModelFamily.")
    for family in families:
        if not isinstance(family, ModelFamily):
            raise PluginError(f"Plugin '{name}': mm_families() returned {family!r} in its list. It takes ModelFamily.")
        if family.api_version != API_VERSION:
            raise PluginError(
                f"Plugin '{name}': family '{family.name}' is written for version {family.api_version} of the hooks, "
                f"this mm-core speaks version {API_VERSION}. Update the {_older(family.api_version)}."
            )
        wrong = [m for m in family.modalities if m not in MODALITIES]
        if isinstance(family.architectures, str) or not family.architectures or wrong:
            raise PluginError(
                f"Plugin '{name}': family '{family.name}' has architectures={family.architectures!r}, modalities="
                f"{family.modalities!r}. Both are tuples; modalities are of {', '.join(MODALITIES)}."
            )
    return tuple(families)


def _older(version: int) -> str:
    return "plugin" if version < API_VERSION else "mm-core distribution"


_ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "mm_encoder": ("hidden_size", "weight_map", "cost", "__call__"),
    "mm_fusion": ("kind", "positions"),
    "mm_bench": ("prompt", "models", "encoder_flops", "encoder_params"),
}
_RETURNS: Mapping[str, str] = {
    "mm_families": "a list of ModelFamily",
    "mm_processor": "a Processor",
    "mm_encoder": "an Encoder (an nn.Module with hidden_size, weight_map and cost)",
    "mm_fusion": f"a Fusion (kind of {', '.join(_FUSION_KINDS)}; positions)",
    "mm_decoder": "a DecoderSpec",
    "mm_tasks": "a mapping from names to tasks (callables that give generators)",
    "mm_bench": "a BenchFamily",
}


def _wanted(hook: str) -> str:
    return f"It must return {_RETURNS[hook]}."


def _fault(hook: str, result: Any) -> str | None:
    """What is wrong with what a hook gave; None where it is as the contract says."""
    kind = type(result).__name__
    if hook == "mm_decoder" and not isinstance(result, DecoderSpec):
        return f"returned {kind}"
    if hook == "mm_tasks" and not (isinstance(result, Mapping) and all(map(callable, result.values()))):
        return f"returned {kind}"
    needed = _ATTRIBUTES.get(hook, ())
    if hook == "mm_processor" and not isinstance(result, Processor):
        needed = tuple(n for n in (*Processor.__annotations__, *vars(Processor)) if not n.startswith("_"))
    absent = [name for name in needed if not hasattr(result, name)]
    if absent:
        return f"returned {kind} without {', '.join(absent)}"
    if hook == "mm_fusion" and result.kind not in _FUSION_KINDS:
        return f"returned {kind} with kind={result.kind!r}"
    return None
