"""The examples run as they are, and what they print of the cache is what each is about."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
_COST = re.compile(r"(\d+) tokens reused, +(\d+) computed")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home folder of its own, so that nothing is left behind."""
    return tmp_path


def run(script: str, home: Path) -> str:
    """What a script prints; fails the test when it fails, warns, or the model answers wrong."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HOME": str(home)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Transformers shows the progress of loading there.
    assert "Warning" not in done.stderr
    assert "wrong" not in done.stdout
    return done.stdout


def numbers(pattern: str, text: str) -> list[int]:
    """The number in every place where the pattern is."""
    return [int(found.replace(",", "")) for found in re.findall(pattern, text)]


def costs(text: str) -> list[tuple[int, int]]:
    """Tokens reused and computed of every request."""
    return [(int(reused), int(computed)) for reused, computed in _COST.findall(text)]


def test_every_example_is_tested_and_listed() -> None:
    """A new script gets a line in the README and a test here."""
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    listed = set(re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text("utf-8")))
    tested = set(re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text("utf-8")))

    assert scripts == listed == tested
    for script in scripts:
        assert len((EXAMPLES / script).read_text("utf-8").splitlines()) < 120


def test_the_support_bot_forgets_a_session_and_keeps_the_handbook(home: Path) -> None:
    """Whoever comes after the first customer computes no handbook, also when that one has gone."""
    shown = run("support_bot.py", home)
    (none, handbook), *others = costs(shown)

    assert none == 0
    assert len(others) == 6
    assert all(reused > 0.8 * handbook > computed for reused, computed in others)
    assert numbers(r"closed ada: (\d+) blocks", shown) > [0]
    own = dict(re.findall(r"session (\w+): \d+ blocks, (\d+) its own", shown))
    assert numbers(r"closed ada: (\d+) blocks", shown) == [int(own["ada"])]


def test_the_news_desk_serves_nothing_that_has_expired(home: Path) -> None:
    """Readers share a bulletin as long as it is news; then all of it is unknown, and swept away."""
    shown = run("news_desk.py", home)
    tokens = numbers(r"bulletin: (\d+) tokens", shown)[0]
    first, second, third, fourth, fifth = costs(shown)

    assert first[0] == fourth[0] == 0
    assert all(reused > 0.8 * tokens for reused, _ in (second, third, fifth))
    assert numbers(r": (\d+) tokens of the bulletin are known", shown)[1] == 0
    assert numbers(r"swept away: (\d+) blocks", shown) > [0]


def test_the_coding_assistant_keeps_what_an_edit_does_not_touch(home: Path) -> None:
    """The edited file alone is computed again; another workspace leaves the device and comes back."""
    shown = run("coding_assistant.py", home)
    lines = [line for line in shown.splitlines() if "prompt tokens" in line]
    sources = [dict(re.findall(r"'(\w+)': (\d+)", line)) for line in lines]
    first, second, edited, other, back = (
        {source: int(count) for source, count in one.items()} for one in sources
    )

    assert set(first) == {"computed"}
    assert second["device"] > 0.9 * first["computed"]
    assert 0 < edited["computed"] < first["computed"] / 2 < edited["device"]
    assert numbers(r"(\d+) blocks of ledger.py@v1 are left", shown) == [0]
    assert set(other) == {"computed"}
    assert back["host"] > 0.9 * first["computed"]


def test_the_catalogue_is_computed_once_for_all(home: Path) -> None:
    """Of many questions only their ends are computed, and nearly all answers are right."""
    shown = run("product_catalogue.py", home)

    assert len(numbers(r"warmed (\d) of 4", shown)) == 4
    assert numbers(r"(\d+) answered right", shown) > [21]
    assert numbers(r"shared \((\d+)%\)", shown) > [90]


def test_the_voice_assistant_stays_warm(home: Path) -> None:
    """Pinned skills survive work that evicts other blocks."""
    shown = run("voice_assistant.py", home)
    found = [(int(a), int(b)) for a, b in re.findall(r"(\d+) of (\d+) tokens computed", shown)]
    (cold, whole), *warm = found

    assert cold == whole
    assert len(warm) == 4
    assert all(computed < 0.2 * total for computed, total in warm)
    assert len(numbers(r"pinned skill:\w+: (\d+) blocks", shown)) == 3
    assert numbers(r"evicted (\d+) blocks", shown) > [0]


def test_rag_purges_what_depends_on_a_document(home: Path) -> None:
    """The preview is what the purge does; answers come from the new edition."""
    shown = run("rag.py", home)
    first, second, third, untouched, changed = costs(shown)

    assert first[0] == 0
    assert second[0] > 0.9 * first[1]
    assert third[0] > 0  # the first document is the same
    preview, purged = (
        numbers(r"(\d+) blocks depend", shown),
        numbers(r"purged: (\d+) blocks", shown),
    )
    assert preview == purged > [0]
    assert untouched[1] < 0.2 * sum(untouched)
    assert 0.3 * sum(changed) < changed[1] < 0.7 * sum(changed)


def test_the_long_document_survives_a_restart(home: Path) -> None:
    """The second process loads it from disk and computes only the question."""
    shown = run("long_document.py", home)
    lines = [line for line in shown.splitlines() if "prompt tokens" in line]
    before, after = lines[:3], lines[3:]

    assert "'disk'" not in "".join(before)
    assert "'device'" in before[1]
    loaded = numbers(r"'disk': (\d+)", after[0])
    assert loaded > [3000]
    assert numbers(r"'computed': (\d+)", after[0]) < [40]
