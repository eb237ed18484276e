"""Starting the engine's process: what it is told, and what it inherits."""

from __future__ import annotations

import importlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from mm_core.config import EngineConfig
from mm_core.engine.process.arena import Arena, arena_bytes
from mm_core.engine.process.plain import pack
from mm_core.engine.process.wire import Start
from mm_core.errors import ConfigError


@dataclass(frozen=True)
class Launch:
    """What is started. plugins: (whether it is a module's name, or an installed plugin's; the name) each."""

    model: str
    config: EngineConfig
    plugins: tuple[tuple[bool, str], ...] = ()

    def message(self) -> Start:
        """The first message."""
        level = logging.getLogger("mm_core").getEffectiveLevel()
        config = pack(self.config.model_dump())
        return Start(self.model, config, list(self.plugins), arena_bytes(self.config), level)


def plugin_names(plugins: Sequence[Any] | None) -> tuple[tuple[bool, str], ...]:
    """Plugins as they travel. Raises ConfigError for one that another process cannot import by name."""
    names = []
    for plugin in plugins or ():
        if isinstance(plugin, str):
            names.append((False, plugin))
            continue
        name = plugin.__name__ if isinstance(plugin, ModuleType) and plugin.__spec__ is not None else "__main__"
        if name == "__main__" or sys.modules.get(name) is not plugin:
            raise ConfigError(
                f"plugins=[...] holds a {type(plugin).__name__} that the engine's process cannot import by name. Put "
                "the hooks into a module that can be imported, or use engine_process=False."
            )
        names.append((True, name))
    return tuple(names)


def import_plugins(names: Sequence[tuple[bool, str]]) -> list[Any]:
    """The plugins, in the engine's process."""
    return [importlib.import_module(name) if is_module else name for is_module, name in names]


def spawn(arena: Arena) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The process, and this end of its connection. Call it from a thread that lives as long as the process may: on
    Linux it ends with the thread that started it."""
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            # -P: nothing is imported from the working directory that this process would not import from there.
            arguments = [sys.executable, "-P", "-m", "mm_core.engine.process.child"]
            handed = (theirs.fileno(), arena.descriptor)
            process = subprocess.Popen(
                [*arguments, *map(str, handed), str(os.getpid())],
                pass_fds=handed,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                process_group=0,  # Ctrl-C at the terminal is for this process, which ends that one in order
            )
    except BaseException:
        ours.close()
        raise
    return process, ours
