"""Show the recipes and the flags that they stand for."""

from __future__ import annotations

from dataclasses import dataclass

from stec.cli.flags import parse
from stec.distributed.launcher import is_main_process
from stec.recipes import RECIPES, flags


@dataclass(frozen=True)
class RecipesConfig:
    """Show the recipes and the flags that they stand for."""


def run(arguments: list[str]) -> None:
    """Show the recipes and the flags that they stand for."""
    parse(RecipesConfig, arguments, name="recipes")

    from stec.console import Console

    rows = [[name, flags(make())] for name, make in RECIPES.items()]
    Console(enabled=is_main_process()).table("Recipes", ["--recipe", "stands for"], rows, numbers=False)
