"""Imports point down only, and the bookkeeping runs without tensors."""

import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "kvkeep"
PARTS_WITHOUT_TENSORS = ("blocks", "policies", "planning", "scheduling")

IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
loaded = sorted({"torch", "transformers"} & set(sys.modules))
sys.exit(f"{sys.argv[1]} loads {loaded}" if loaded else 0)
"""


def test_the_import_contracts_hold(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every contract of pyproject.toml is kept; the report names the import that breaks one."""
    monkeypatch.chdir(ROOT)

    status = lint_imports(no_cache=True, no_logo=True)

    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out


@pytest.mark.parametrize("part", PARTS_WITHOUT_TENSORS)
def test_bookkeeping_runs_without_torch(part: str) -> None:
    """Importing all modules of the part loads neither torch nor transformers."""
    if not (SOURCE / part / "__init__.py").exists():
        pytest.skip(f"kvkeep.{part} does not exist")

    run = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, f"kvkeep.{part}"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert run.returncode == 0, run.stderr
