"""The public surface: what `import kvkeep` gives, and what it costs."""

import subprocess
import sys
from pathlib import Path

import pytest

import kvkeep

LIST_LOADED = """
import sys
import kvkeep
heavy = {"torch", "transformers", "numpy", "click", "rich"}
print(*sorted(name for name in sys.modules if name in heavy or name.startswith("kvkeep")))
"""


def test_importing_kvkeep_loads_nothing_else() -> None:
    """A bare import loads no other module of kvkeep, and none of the libraries it stands on."""
    run = subprocess.run(
        [sys.executable, "-c", LIST_LOADED], capture_output=True, text=True, check=True
    )

    assert run.stdout.split() == ["kvkeep"]


@pytest.mark.parametrize("name", kvkeep.__all__)
def test_every_public_name_resolves(name: str) -> None:
    """Each name of `__all__` is there, and is the same object the second time."""
    value = getattr(kvkeep, name)

    assert value is not None
    assert getattr(kvkeep, name) is value


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A misspelt name fails as it does on any module, with the name in the message."""
    with pytest.raises(AttributeError, match="'SamplingParameters'"):
        _ = kvkeep.SamplingParameters


def test_dir_lists_the_public_names() -> None:
    """Completion in a shell offers what is public."""
    assert dir(kvkeep) == sorted(kvkeep.__all__)


def test_the_package_says_that_it_is_typed() -> None:
    """The marker that makes type checkers read our annotations is shipped."""
    assert (Path(kvkeep.__file__).parent / "py.typed").exists()
