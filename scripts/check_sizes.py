"""Check the house rules that no linter knows: sizes, import cycles and vague names.

Every finding is printed as ``file:line: what is wrong``; the exit status is 1 when there is one.
Files stay under 400 lines and functions under 50; modules of the package do not import each other
in a circle; files and classes are not called manager, helper, util and the like.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON_FOLDERS = ("src", "models", "benchmarks", "tests", "scripts", "examples")
NATIVE_SUFFIXES = (".cpp", ".h", ".hpp")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
VAGUE_WORDS = frozenset(
    {"manager", "managers", "helper", "helpers", "util", "utils", "handler", "handlers"}
    | {"data", "info", "misc"}
)


def python_files(root: Path) -> list[Path]:
    """Every Python file that the rules hold for."""
    return sorted(path for folder in PYTHON_FOLDERS for path in (root / folder).rglob("*.py"))


def oversized_files(root: Path) -> Iterator[str]:
    """Files of MAX_FILE_LINES lines and more, native sources included."""
    native = sorted(p for p in (root / "native").rglob("*") if p.suffix in NATIVE_SUFFIXES)
    for path in [*python_files(root), *native]:
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        if num_lines >= MAX_FILE_LINES:
            yield f"{path.relative_to(root)}:1: {num_lines} lines, limit {MAX_FILE_LINES - 1}"


def oversized_functions(root: Path) -> Iterator[str]:
    """Functions of MAX_FUNCTION_LINES lines and more, docstring included."""
    for path in python_files(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if num_lines >= MAX_FUNCTION_LINES:
                where = f"{path.relative_to(root)}:{node.lineno}"
                yield f"{where}: {node.name} has {num_lines} lines, limit {MAX_FUNCTION_LINES - 1}"


def words_of(name: str) -> set[str]:
    """The words of a snake_case or CamelCase name, in lower case.

    >>> sorted(words_of("BlockTable")), sorted(words_of("cost_model"))
    (['block', 'table'], ['cost', 'model'])
    """
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", name)}


def vague_names(root: Path) -> Iterator[str]:
    """Files and classes whose name does not say what they do."""
    for path in python_files(root):
        places = [(1, path.stem)]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        places += [(n.lineno, n.name) for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
        for line, name in places:
            for word in sorted(words_of(name) & VAGUE_WORDS):
                yield f"{path.relative_to(root)}:{line}: '{word}' in the name {name} says nothing"


def module_name(path: Path, source: Path) -> str:
    """The dotted name of a file below the source folder."""
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_at_load(statements: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run with the module: none inside functions or under TYPE_CHECKING."""
    for statement in statements:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            yield statement
        elif isinstance(statement, ast.If):
            if "TYPE_CHECKING" not in ast.dump(statement.test):
                yield from imports_at_load(statement.body)
            yield from imports_at_load(statement.orelse)
        elif isinstance(statement, ast.Try):
            yield from imports_at_load(statement.body)


def imported_modules(
    statement: ast.Import | ast.ImportFrom, known: dict[str, Path]
) -> Iterator[str]:
    """The modules of the package that one import statement loads by name."""
    if isinstance(statement, ast.Import):
        yield from (alias.name for alias in statement.names if alias.name in known)
        return
    for alias in statement.names:
        inner = f"{statement.module}.{alias.name}"
        if inner in known:
            yield inner
        elif statement.module in known:
            yield statement.module


def import_graph(source: Path) -> dict[str, dict[str, int]]:
    """Module -> module it imports at load -> line of that import."""
    known = {module_name(path, source): path for path in sorted(source.rglob("*.py"))}
    graph: dict[str, dict[str, int]] = {}
    for name, path in known.items():
        graph[name] = {}
        for statement in imports_at_load(ast.parse(path.read_text(encoding="utf-8")).body):
            for imported in imported_modules(statement, known):
                graph[name].setdefault(imported, statement.lineno)
    return graph


def reachable(graph: dict[str, dict[str, int]], start: str) -> set[str]:
    """Every module loaded by loading `start`, itself only when it is part of a cycle."""
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting.extend(graph[module])
    return seen


def import_cycles(root: Path) -> Iterator[str]:
    """Imports that are part of a circle of modules."""
    source = root / "src"
    graph = import_graph(source)
    loaded = {module: reachable(graph, module) for module in graph}
    for module, imports in graph.items():
        path = source / Path(*module.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for imported, line in imports.items():
            if module in loaded[imported] or module == imported:
                yield f"{file.relative_to(root)}:{line}: {module} and {imported} import each other"


def findings(root: Path) -> list[str]:
    """Everything that breaks a rule, in the order of the rules."""
    rules = (oversized_files, oversized_functions, vague_names, import_cycles)
    return [finding for rule in rules for finding in rule(root)]


def main() -> int:
    """Print the findings; 1 when there are any."""
    found = findings(ROOT)
    print("\n".join(found) if found else "sizes, names and import cycles: nothing found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
