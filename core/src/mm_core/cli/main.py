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
    arguments = _parser().parse_args(argv)
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

    command = commands.add_parser("run", help="ask a model once", allow_abbrev=False)
    add_run_arguments(command)
    command.set_defaults(call=run)

    command = commands.add_parser("chat", help="talk with a model, or with a server", allow_abbrev=False)
    add_chat_arguments(command)
    command.set_defaults(call=chat)

    command = commands.add_parser("serve", help="answer calls over HTTP, as OpenAI's API", allow_abbrev=False)
    add_serve_arguments(command)
    command.set_defaults(call=serve)

    command = commands.add_parser("bench", help="measure throughput and latency", allow_abbrev=False)
    add_bench_arguments(command)
    command.set_defaults(call=bench)

    command = commands.add_parser("cache-sim", help="replay a trace against the caches alone", allow_abbrev=False)
    add_cache_sim_arguments(command)
    command.set_defaults(call=cache_sim)

    command = commands.add_parser("new-plugin", help="write a working plugin to begin from", allow_abbrev=False)
    add_new_plugin_arguments(command)
    command.set_defaults(call=new_plugin)

    command = commands.add_parser("plugins", help="list the installed plugins", allow_abbrev=False)
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(call=tables.plugins)

    command = commands.add_parser("env", help="print the versions that a bug report needs", allow_abbrev=False)
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(call=tables.environment)
    return parser
