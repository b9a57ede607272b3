"""Command line of the S-TEC trainer: ``accelerate launch launch.py [train | eval | index | export | ...] [flags]``."""

from __future__ import annotations

import importlib
import os
import sys

from pipelines.decoder_messages import decoder_messages_dropped
from pipelines.errors import Interrupted, UserError
from stec import __version__
from stec.cli.streams import make_robust
from stec.distributed.launcher import check_environment, exit_with_launcher, is_main_process
from stec.environment import set_library_defaults

COMMANDS = {
    "train": "train",
    "eval": "evaluate",
    "embed": "embed",
    "index": "index",
    "pack": "pack",
    "import": "import_checkpoint",
    "export": "export",
    "recipes": "recipes",
    "preview": "preview",
    "report": "report",
}
"""The commands, each with the module of ``stec.cli`` that runs it."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command named by the first argument (default: train), and return the exit code."""
    set_library_defaults()
    make_robust()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--version" in arguments:
        print(f"stec {__version__}")
        return 0
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "train"
    try:
        check_environment(os.environ)
        exit_with_launcher()
        if name not in COMMANDS:
            raise UserError(f"{name} is no command; known are {', '.join(COMMANDS)}; without one it trains.")
        with decoder_messages_dropped():
            importlib.import_module(f"stec.cli.{COMMANDS[name]}").run(arguments)
    except UserError as error:
        if is_main_process():
            print(f"error: {error}", file=sys.stderr)
        elif error.local:
            print(f"error on process {os.environ['RANK']}: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        if is_main_process():
            print(stop, file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        if is_main_process():
            print("Stopped immediately.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
