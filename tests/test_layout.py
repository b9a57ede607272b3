"""Which package may import from which."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def packages_imported(file: Path) -> set[str]:
    """The packages of the project that a file imports from anywhere in it, as dotted names of folders."""
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
    """Of each package below ``top``, or at the top level, what its files import from."""
    found: dict[str, set[str]] = {}
    for file in (ROOT / top).rglob("*.py"):
        package = ".".join(file.parent.relative_to(ROOT).parts)
        found.setdefault(package, set()).update(packages_imported(file))
    return found


def test_pipelines_need_nothing_of_the_trainer() -> None:
    found = {package: sorted(others) for package, others in imports("pipelines").items()}
    assert len(found) > 2
    assert not {
        package: others for package, others in found.items() if any(not o.startswith("pipelines") for o in others)
    }


@pytest.mark.parametrize("top", ["pipelines", "stec"])
def test_no_packages_import_each_other(top: str) -> None:
    """However long the way around is; a package's own top level serves those below it."""
    graph = {
        package: {other for other in others if other not in (package, top) and other.startswith(f"{top}.")}
        for package, others in imports(top).items()
        if package != top
    }

    def reachable(package: str) -> set[str]:
        seen: set[str] = set()
        left = [package]
        while left:
            for other in graph.get(left.pop(), set()) - seen:
                seen.add(other)
                left.append(other)
        return seen

    assert len(graph) > 1
    assert not [package for package in graph if package in reachable(package)]


def test_the_trainer_needs_no_command_line() -> None:
    for package, others in imports("stec").items():
        if package not in ("stec.cli",):
            assert "stec.cli" not in others, package


def test_pipelines_can_be_used_alone() -> None:
    """The example trains with them where there is no trainer."""
    program = "import runpy, sys; sys.modules['stec'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    example = ROOT / "examples" / "custom_trainer.py"
    done = subprocess.run(
        [sys.executable, "-c", program, example], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "step 7" in done.stdout
