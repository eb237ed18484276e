"""The `mm` command."""

from mm_core.cli.main import main

__all__ = ["main"]
