"""The file of contexts: what holds is read again, whatever happened while it was written."""

import json
from array import array
from pathlib import Path

import pytest

from kvkeep.server.cache_contexts import Context
from kvkeep.server.context_file import ContextFile

MODEL = "sha256:aa"


def context(
    name: str, *, tokens: int = 3, salt: str | None = None, pin: str | None = None
) -> Context:
    """A context of that name."""
    return Context(
        name=name,
        salt=salt,
        token_ids=array("I", range(70_000, 70_000 + tokens)),
        tags=("a", "b"),
        ttl="7d",
        pin=pin,
        created_at=1.5,
        warmed_at=2.5,
        owner="531f5430",
    )


def names(path: Path, model: str = MODEL) -> list[str]:
    """Of the contexts that another process would find."""
    return [one.name for one in ContextFile(path).load(model)]


def test_what_is_put_is_loaded_with_all_its_fields(tmp_path: Path) -> None:
    """Of this model only, by salt and name; the last form of each."""
    file = ContextFile(tmp_path / "new" / "contexts")
    for one in (context("law"), context("law", salt="ä"), context("law", tokens=5, pin="p")):
        file.put(MODEL, one)
    file.put("sha256:bb", context("other"))

    found = ContextFile(tmp_path / "new" / "contexts").load(MODEL)

    assert found == [context("law", salt="ä"), context("law", tokens=5, pin="p")]
    assert names(tmp_path / "new" / "contexts", "sha256:bb") == ["other"]


def test_what_is_removed_is_gone_and_its_tokens_with_tidying(tmp_path: Path) -> None:
    """Prompts of contexts that are no more do not stay on the disk."""
    path = tmp_path / "contexts"
    file = ContextFile(path)
    file.put(MODEL, context("law"))
    file.put(MODEL, context("kept", tokens=1))
    written = path.read_text()
    file.remove(MODEL, context("law"))

    assert names(path) == ["kept"]
    file.tidy()

    assert names(path) == ["kept"]
    secret = json.loads(written.split()[0])["tokens"]
    assert secret in written
    assert secret not in path.read_text()
    assert [one.name for one in tmp_path.iterdir()] == ["contexts"]


def test_only_its_owner_reads_the_file(tmp_path: Path) -> None:
    """It has prompts in it; also after it was written anew."""
    path = tmp_path / "contexts"
    file = ContextFile(path)
    for _ in range(2):
        file.put(MODEL, context("law"))
    before = path.stat().st_mode & 0o777
    file.tidy()

    assert before == path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_cut_off_anywhere_loses_no_more_than_its_last_line(tmp_path: Path) -> None:
    """As kill -9 and power cuts leave it; what is written behind it counts."""
    whole = tmp_path / "whole"
    for name in ("one", "two"):
        ContextFile(whole).put(MODEL, context(name))
    first, second = whole.read_bytes().splitlines(keepends=True)[1::2]
    for length in range(0, len(second), 9):
        path = tmp_path / "cut"
        path.write_bytes(first + second[:length])
        file = ContextFile(path)

        assert [one.name for one in file.load(MODEL)][:1] == ["one"]
        file.put(MODEL, context("three"))

        assert names(path)[0] == "one"
        assert names(path)[-1] == "three"
        file.tidy()
        assert names(path)[-1] == "three"


def test_the_file_does_not_grow_with_changes(tmp_path: Path) -> None:
    """A context that is renewed a thousand times has few lines."""
    path = tmp_path / "contexts"
    file = ContextFile(path)
    for number in range(1000):
        file.put(MODEL, context(f"c{number % 4}"))

    assert sorted(names(path)) == ["c0", "c1", "c2", "c3"]
    assert len(path.read_bytes()) < 100 * 2 * len(path.read_bytes().split()[0])


def test_lines_of_a_later_version_stay(tmp_path: Path) -> None:
    """They are not understood, and not thrown away."""
    path = tmp_path / "contexts"
    line = '{"v": 2, "model": "m", "name": ["new"], "colour": "red"}'
    path.write_text(f"{line}\n")
    file = ContextFile(path)
    for _ in range(200):
        file.put(MODEL, context("law"))
    file.tidy()

    assert names(path) == ["law"]
    assert line in path.read_text()


def test_a_file_that_cannot_be_costs_names_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning, no error."""
    (tmp_path / "folder").mkdir()
    file = ContextFile(tmp_path / "folder")

    assert file.load(MODEL) == []
    file.put(MODEL, context("law"))
    file.put(MODEL, context("law"))
    file.tidy()

    assert [one.levelname for one in caplog.records] == ["WARNING"]
    assert "names of contexts" in caplog.text
