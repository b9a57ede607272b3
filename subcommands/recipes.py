"""Show the recipes and the flags that they stand for."""

from __future__ import annotations

from stec.errors import UserError
from stec.recipes import RECIPES, flags
from subcommands.common import is_main_process


def run(arguments: list[str]) -> None:
    """Show the recipes and the flags that they stand for."""
    if arguments:
        raise UserError(f"launch.py recipes takes no arguments, but got {' '.join(arguments)}.")

    from stec.console import Console

    rows = [[name, flags(make())] for name, make in RECIPES.items()]
    Console(enabled=is_main_process()).table("Recipes", ["--recipe", "stands for"], rows, numbers=False)
