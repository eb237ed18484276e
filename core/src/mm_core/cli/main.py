"""The `mm` command: arguments, and what every subcommand does with errors.

Nothing heavy is imported before a subcommand needs it, so that `mm --help` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from mm_core import __version__
from mm_core.cli import tables
from mm_core.cli.bench import add_bench_arguments, bench
from mm_core.cli.cache_sim import add_cache_sim_arguments, cache_sim
from mm_core.cli.chat import add_chat_arguments, chat
from mm_core.cli.new_plugin import add_new_plugin_arguments, new_plugin
from mm_core.cli.run import add_run_arguments, run
from mm_core.cli.serve import add_serve_arguments, serve
from mm_core.errors import MMError


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mm` with these arguments (None: the process's own); gives the exit code.

    0: done. 1: an error of mm-core, told in one line. 2: wrong usage. 130: interrupted.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    arguments, unknown = _parser().parse_known_args(argv)
    if unknown:
        arguments.usage_error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return int(arguments.call(arguments))
    except MMError as error:
        print(f"mm: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mm: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mm", description="Run models that read images, video and audio beside text.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"mm-core {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.set_defaults(usage_error=command.error)  # a mode of a command sets its own
        return command

    command = add("run", "ask a model once")
    add_run_arguments(command)
    command.set_defaults(call=run)

    command = add("chat", "talk with a model, or with a server")
    add_chat_arguments(command)
    command.set_defaults(call=chat)

    command = add("serve", "answer calls over HTTP, as OpenAI's API")
    add_serve_arguments(command)
    command.set_defaults(call=serve)

    command = add("bench", "measure throughput and latency")
    add_bench_arguments(command)
    command.set_defaults(call=bench)

    command = add("cache-sim", "replay a trace against the caches alone")
    add_cache_sim_arguments(command)
    command.set_defaults(call=cache_sim)

    command = add("new-plugin", "write a working plugin to begin from")
    add_new_plugin_arguments(command)
    command.set_defaults(call=new_plugin)

    command = add("plugins", "list the installed plugins")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(call=tables.plugins)

    command = add("env", "print the versions that a bug report needs")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(call=tables.environment)
    return parser
