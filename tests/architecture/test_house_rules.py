"""The rules of CONTRIBUTING.md that a machine can check and no linter knows."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import pytest

from scripts import check_sizes

ROOT = Path(__file__).resolve().parents[2]
SOURCE_FILES = sorted((ROOT / "src").rglob("*.py"))
# Programs whose standard output is their product.
PRINTING_FOLDERS = {ROOT / "src" / "kvkeep" / "cli"}

Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def is_undocumented(node: ast.stmt) -> TypeGuard[Documented]:
    """Whether a statement defines something public without docstring."""
    return (
        isinstance(node, Documented)
        and not node.name.startswith("_")
        and ast.get_docstring(node) is None
    )


def relative(path: Path) -> str:
    """A path as it reads from the root of the repository."""
    return str(path.relative_to(ROOT))


def undocumented(tree: ast.Module) -> Iterator[Documented]:
    """What is public and has no docstring; a subclass inherits the contract of its methods."""
    for node in tree.body:
        if is_undocumented(node):
            yield node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not node.bases:
            yield from filter(is_undocumented, node.body)


def test_sizes_names_and_cycles() -> None:
    """Files and functions are small, names say something, and no modules import in a circle."""
    assert check_sizes.findings(ROOT) == []


@pytest.mark.parametrize("path", SOURCE_FILES, ids=relative)
def test_every_public_class_and_function_is_documented(path: Path) -> None:
    """What others call says what it does."""
    found = [
        f"{node.name}, line {node.lineno}" for node in undocumented(ast.parse(path.read_text()))
    ]

    assert found == []


def test_the_library_does_not_print() -> None:
    """Only programs write to standard output; a library logs or returns."""
    found = [
        f"{relative(path)}:{node.lineno}"
        for path in SOURCE_FILES
        if not PRINTING_FOLDERS.intersection(path.parents)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]

    assert found == []


def test_the_size_check_sees_what_it_should(tmp_path: Path) -> None:
    """Each rule reports its kind of fault, with file and line."""
    source = tmp_path / "src" / "pkg"
    source.mkdir(parents=True)
    (source / "__init__.py").write_text("")
    (source / "long_file.py").write_text("x = 1\n" * check_sizes.MAX_FILE_LINES)
    (source / "long_function.py").write_text(
        "\ndef f():\n" + "    x = 1\n" * check_sizes.MAX_FUNCTION_LINES
    )
    (source / "block_manager.py").write_text("class TierHelper: ...\n")
    (source / "one.py").write_text("import pkg.two\n")
    (source / "two.py").write_text("from pkg import one\n")

    places = [finding.split(" ")[0] for finding in check_sizes.findings(tmp_path)]

    assert places == [
        "src/pkg/long_file.py:1:",
        "src/pkg/long_function.py:2:",
        "src/pkg/block_manager.py:1:",
        "src/pkg/block_manager.py:1:",
        "src/pkg/one.py:1:",
        "src/pkg/two.py:1:",
    ]
