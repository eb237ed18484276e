"""`mm new-plugin`: a working plugin to begin from."""

from __future__ import annotations

import argparse
import re
from importlib.resources import files
from pathlib import Path
from string import Template

from mm_core import __version__
from mm_core.errors import ConfigError

_NAME = re.compile(r"[a-z][a-z0-9]*")
# Where each template goes; `$name` and `$Class` stand in paths as in contents.
_FILES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "__init__.py": "src/mm_plugin_$name/__init__.py",
    "processor.py": "src/mm_plugin_$name/processor.py",
    "encoder.py": "src/mm_plugin_$name/encoder.py",
    "fusion.py": "src/mm_plugin_$name/fusion.py",
    "py.typed": "src/mm_plugin_$name/py.typed",
    "conformance.py": "tests/test_conformance.py",
}


def add_new_plugin_arguments(command: argparse.ArgumentParser) -> None:
    """Arguments of `mm new-plugin`."""
    command.add_argument("name", help="the family's name: lower-case letters and digits, e.g. myfamily")
    command.add_argument(
        "--directory", type=Path, default=Path(), help="where mm-plugin-NAME is made (default: the current directory)"
    )


def new_plugin(arguments: argparse.Namespace) -> int:
    """Write the plugin; tell where it is and what to do next."""
    path = write_plugin(arguments.name, arguments.directory)
    print(f"Wrote {path}\nNext: pip install -e '{path}[test]' && pytest {path}")
    return 0


def write_plugin(name: str, directory: Path) -> Path:
    """Write `mm-plugin-NAME` into a directory; gives its path.

    It is a whole, made-up family whose tests pass. Raises ConfigError where the name is no name, or taken there.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"A family cannot be called {name!r}: its name is also a package's and a module's. Use lower-case letters "
            "and digits, beginning with a letter, e.g. 'myfamily'."
        )
    target = directory / f"mm-plugin-{name}"
    if target.exists():
        raise ConfigError(f"{str(target)!r} exists. Choose another name or --directory, or delete it.")
    values = {"name": name, "Class": name[0].upper() + name[1:], "core": ".".join(__version__.split(".")[:2])}
    templates = files("mm_core.cli") / "template"
    for template, place in _FILES.items():
        path = target / Template(place).substitute(values)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = (templates / f"{template}.txt").read_text(encoding="utf-8")
        path.write_text(Template(text).substitute(values), encoding="utf-8")
    return target
