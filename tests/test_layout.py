"""Which package may import from which."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def packages_imported(file: Path) -> set[str]:
    """The project's packages that a file imports from, at its top level or in functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{file} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    folders = set()
    for name in names:
        folder = ROOT.joinpath(*name.split("."))
        while not (folder / "__init__.py").exists() and folder != ROOT:
            folder = folder.parent
        folders.add(".".join(folder.relative_to(ROOT).parts))
    return {folder for folder in folders if folder.split(".")[0] in ("stec", "pipelines", "tests", "benchmarks")}


def imports(top: str) -> dict[str, set[str]]:
    """For each package in the folder ``top``, the packages that its files import from."""
    graph: dict[str, set[str]] = {}
    for file in (ROOT / top).rglob("*.py"):
        package = ".".join(file.parent.relative_to(ROOT).parts)
        graph.setdefault(package, set()).update(packages_imported(file))
    return graph


def test_pipelines_do_not_import_the_trainer() -> None:
    graph = imports("pipelines")
    assert len(graph) > 2
    assert not {other for others in graph.values() for other in others if not other.startswith("pipelines")}


@pytest.mark.parametrize("top", ["pipelines", "stec"])
def test_packages_do_not_import_each_other(top: str) -> None:
    """Directly or through others; modules at the top level of a package may be imported by packages in it."""
    graph = {
        package: {other for other in others if other not in (package, top) and other.startswith(f"{top}.")}
        for package, others in imports(top).items()
        if package != top
    }

    def reachable(package: str) -> set[str]:
        seen: set[str] = set()
        pending = [package]
        while pending:
            for other in graph.get(pending.pop(), set()) - seen:
                seen.add(other)
                pending.append(other)
        return seen

    assert len(graph) > 1
    assert not [package for package in graph if package in reachable(package)]


def test_the_trainer_does_not_import_the_command_line() -> None:
    for package, others in imports("stec").items():
        if package not in ("stec.cli",):
            assert "stec.cli" not in others, package


def test_benchmarks_import_neither_tests_nor_the_command_line() -> None:
    assert not {"tests", "stec.cli"} & set().union(*imports("benchmarks").values())


def test_pipelines_work_without_the_trainer() -> None:
    program = "import runpy, sys; sys.modules['stec'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    example = ROOT / "examples" / "custom_trainer.py"
    result = subprocess.run(
        [sys.executable, "-c", program, example], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "step 7" in result.stdout
