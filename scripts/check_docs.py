"""Check the documents against the code: links, Python examples and command line help.

* every relative link of a Markdown file leads to a file, and its anchor to a heading;
* every ``python`` block compiles, and the names it imports from kvkeep exist;
* text between ``<!-- cli-help: serve -->`` and ``<!-- /cli-help -->`` is the help of that command;
  an empty name means the program itself. ``--write`` brings these parts up to date.

Findings are printed as ``file:line: what is wrong``; the exit status is 1 when there is one.
"""

import argparse
import ast
import doctest
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT_PATTERNS = ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/**/*.md")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)")
FENCE = re.compile(r"^\s*(```+|~~~+)\s*(\w*)")
HELP_PART = re.compile(r"(<!-- cli-help:[ ]*([\w -]*?) ?-->\n).*?(<!-- /cli-help -->)", re.DOTALL)


def documents(root: Path) -> list[Path]:
    """Every Markdown file that is checked."""
    return sorted({path for pattern in DOCUMENT_PATTERNS for path in root.glob(pattern)})


def prose_lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines outside fenced blocks."""
    closing = None
    for number, line in enumerate(text.splitlines(), 1):
        fence = FENCE.match(line)
        if fence and closing is None:
            closing = fence[1]
        elif fence and fence[1].startswith(closing or ""):
            closing = None
        elif closing is None:
            yield number, line


def python_blocks(text: str) -> Iterator[tuple[int, str]]:
    """First line number and source of each fenced ``python`` block."""
    lines = text.splitlines()
    start, closing = 0, ""
    for number, line in enumerate(lines, 1):
        fence = FENCE.match(line)
        if not fence:
            continue
        if not closing:
            closing, start = fence[1], number if fence[2] in {"python", "py"} else 0
        elif fence[1].startswith(closing):
            if start:
                yield start + 1, "\n".join(lines[start : number - 1]) + "\n"
            closing = ""


def anchors(text: str) -> set[str]:
    r"""The anchors that the headings of a document make.

    >>> sorted(anchors("# A block's `key`\n## Two  words"))
    ['a-blocks-key', 'two--words']
    """
    found = set()
    for _, line in prose_lines(text):
        if line.startswith("#"):
            title = line.lstrip("#").strip().lower()
            found.add(re.sub(r"[^\w\- ]", "", title).replace(" ", "-"))
    found.update(re.findall(r'<a (?:id|name)="([^"]+)"', text))
    return found


def broken_links(path: Path, root: Path) -> Iterator[str]:
    """Relative links that lead nowhere."""
    for number, line in prose_lines(path.read_text(encoding="utf-8")):
        for target in LINK.findall(re.sub(r"`[^`]*`", "``", line)):
            if re.match(r"[a-z][a-z+.-]*:", target):
                continue
            place, _, anchor = target.partition("#")
            file = (path.parent / place).resolve() if place else path
            where = f"{path.relative_to(root)}:{number}"
            if not file.exists():
                yield f"{where}: link to {target}, which does not exist"
            elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text("utf-8")):
                yield f"{where}: link to {target}, which has no such heading"


def names_of_module(file: Path) -> set[str]:
    """What a module defines, imports or lists, as far as its source tells."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def missing_imports(tree: ast.Module, root: Path) -> Iterator[tuple[int, str]]:
    """Line and name of what an example imports from kvkeep in vain."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("kvkeep"):
            continue
        folder = root / "src" / Path(*str(node.module).split("."))
        file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        known = names_of_module(file) if file.exists() else set()
        for alias in node.names:
            is_module = (folder / alias.name).is_dir() or (folder / f"{alias.name}.py").exists()
            if alias.name not in known and not is_module:
                yield node.lineno, f"{node.module}.{alias.name}"


def broken_examples(path: Path, root: Path) -> Iterator[str]:
    """Python blocks that do not compile or import what is not there."""
    for first_line, block in python_blocks(path.read_text(encoding="utf-8")):
        is_session = block.lstrip().startswith(">>>")
        source = doctest.script_from_examples(block) if is_session else block
        try:
            flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST
            tree = compile(source, str(path), "exec", flags=flags)
        except SyntaxError as error:
            line = first_line + (error.lineno or 1) - 1
            yield f"{path.relative_to(root)}:{line}: the example does not compile: {error.msg}"
            continue
        for line, name in missing_imports(tree, root):
            where = f"{path.relative_to(root)}:{first_line + line - 1}"
            yield f"{where}: the example imports {name}, which does not exist"


def command_help(command_name: str) -> str:
    """The help of `kvkeep COMMAND_NAME` as a fenced block."""
    command: click.Command = importlib.import_module("kvkeep.cli.main").main
    context = click.Context(command, info_name="kvkeep", max_content_width=90, terminal_width=90)
    for word in command_name.split():
        assert isinstance(command, click.Group), f"{command.name} has no commands below it"
        child = command.get_command(context, word)
        if child is None:
            raise LookupError(f"kvkeep {command_name} is no command")
        context = click.Context(child, info_name=word, parent=context)
        command = child
    return f"```text\n{command.get_help(context)}\n```\n"


def with_current_help(text: str) -> str:
    """The document with every command line help part made anew."""
    return HELP_PART.sub(lambda part: f"{part[1]}{command_help(part[2].strip())}{part[3]}", text)


def stale_help(path: Path, root: Path) -> Iterator[str]:
    """A document whose command line help is not that of the program."""
    text = path.read_text(encoding="utf-8")
    if with_current_help(text) != text:
        remedy = "run scripts/check_docs.py --write"
        yield f"{path.relative_to(root)}:1: the command line help is out of date, {remedy}"


def findings(root: Path) -> list[str]:
    """Everything that is wrong in the documents."""
    rules = (broken_links, broken_examples, stale_help)
    return [found for path in documents(root) for rule in rules for found in rule(path, root)]


def main() -> int:
    """Print the findings; 1 when there are any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="bring command line help up to date")
    if parser.parse_args().write:
        for path in documents(ROOT):
            text = path.read_text(encoding="utf-8")
            path.write_text(with_current_help(text), encoding="utf-8")
    found = findings(ROOT)
    print(
        "\n".join(found) if found else "documents: links, examples and help are as they should be"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
