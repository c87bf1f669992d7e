"""The documents agree with the code."""

from pathlib import Path

import pytest

from scripts import check_docs

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "path", check_docs.documents(ROOT), ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_document_agrees_with_the_code(path: Path) -> None:
    """Links lead somewhere, examples compile, command line help is that of the program."""
    found = [
        *check_docs.broken_links(path, ROOT),
        *check_docs.broken_examples(path, ROOT),
        *check_docs.stale_help(path, ROOT),
    ]

    assert found == []


def test_the_document_check_sees_what_it_should(tmp_path: Path) -> None:
    """Dead links, missing headings, bad syntax and missing names are found, with the line."""
    package = tmp_path / "src" / "kvkeep"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("there = 1\n")
    (tmp_path / "other.md").write_text("# A heading\n")
    (tmp_path / "README.md").write_text(
        "[good](other.md#a-heading) [dead](gone.md)\n"
        "[bad anchor](other.md#nothing), `[code](is-no-link)`\n"
        "```python\nfrom kvkeep import there, gone\n```\n"
        "```python\nx = = 1\n```\n"
        "```text\n[not](prose)\n```\n"
    )

    places = [finding.split(" ")[0] for finding in check_docs.findings(tmp_path)]

    assert places == ["README.md:1:", "README.md:2:", "README.md:4:", "README.md:7:"]
