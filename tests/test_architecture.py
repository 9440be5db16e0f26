"""The house rules that keep the package readable: imports point up, files stay small, heavy packages stay in place."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moeplace"
FILE_LINES, FUNCTION_LINES = 400, 80
FILES = sorted(PACKAGE.rglob("*.py"))
HOMES = {  # package → where it may be imported, by the start of the file's path in the package
    "click": ("cli/",),
    "rich": ("report.py", "cli/"),
    "pulp": ("milp/cbc.py",),
    "ortools": ("milp/cpsat.py", "chains/duals.py"),
    "matplotlib": ("plots.py", "planning/figures.py"),
    "torch": ("readers/",),
    "numba": ("counting.py", "chains/eigen.py"),
}


def module_of(path: Path) -> str:
    """Top-level name of a file inside the package: its layer."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[str]:
    """Absolute module names that a file imports, anywhere in it."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def layers() -> list[str]:
    """The order of the README's picture."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## How it is built")[1]
    block = re.search(r"```\n(.*?)```", text, re.S)
    assert block is not None
    lines = [re.split(r" {3,}", line)[0] for line in block.group(1).splitlines()]
    return [name.rstrip("/") for line in lines for name in line.split()]


def test_every_module_stands_in_the_readme_picture_once() -> None:
    """The picture of the README names each module of the package exactly once."""
    assert sorted(layers()) == sorted({module_of(path) for path in FILES} - {"__init__", "__main__"})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_up_the_picture(path: Path) -> None:
    """A module imports only modules that stand before it in the picture (or its own folder)."""
    own = module_of(path)
    if own in ("__init__", "__main__"):
        return
    order = {name: place for place, name in enumerate(layers())}
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "moeplace" and len(parts) > 1 and parts[1] in order and parts[1] != own:
            assert order[parts[1]] < order[own], f"{path.name} imports {name}, which stands after it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_packages_stay_in_their_files(path: Path) -> None:
    """Each heavy or optional package is imported only where its home is."""
    place = str(path.relative_to(PACKAGE))
    for name in imports_of(path):
        homes = HOMES.get(name.split(".")[0])
        assert homes is None or place.startswith(homes), f"{place} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path: Path) -> None:
    """No file is longer than 400 lines and no function body longer than 80."""
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            assert (node.end_lineno or 0) - first.lineno + 1 <= FUNCTION_LINES, node.name


def test_solvers_import_neither_each_other_nor_the_command_line() -> None:
    """A solver is one file: methods are combined through the placement they hand on."""
    for path in (PACKAGE / "solvers").glob("*.py"):
        if path.stem == "__init__":
            continue
        for name in imports_of(path):
            assert not name.startswith(("moeplace.solvers", "moeplace.cli", "moeplace.report")), f"{path.name}: {name}"


def test_importing_the_package_imports_nothing_heavy() -> None:
    """``import moeplace`` and the help load neither NumPy nor any solver."""
    code = "import sys, moeplace, moeplace.cli; print(sorted(m for m in sys.modules if m in %r))"
    heavy = ("numpy", "scipy", "ortools", "pulp", "numba", "rich", "orjson")
    done = subprocess.run([sys.executable, "-c", code % (heavy,)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_of_the_package_can_be_imported() -> None:
    """The lazy table of ``moeplace`` names only what its modules have, and type checkers see the same names."""
    import moeplace

    text = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    declared = set(re.findall(r"import (\w+) as \1$", text, re.M))
    assert declared == set(moeplace._HOME_OF)
    for name in declared:
        assert getattr(moeplace, name) is not None
    with pytest.raises(AttributeError):
        _ = moeplace.no_such_name
