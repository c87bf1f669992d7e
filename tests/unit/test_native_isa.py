"""Which instruction set the CPU kernels use on a machine that has AMX, as one that only says so."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvkeep.native import Isa, Kernels, load_kernels
from kvkeep.native.structs import ABI

HEADER = Path(__file__).resolve().parents[2] / "native" / "include" / "kvkeep_native.h"
GXX = shutil.which("g++")


@pytest.fixture
def library_of_a_machine_with_amx(tmp_path: Path) -> Path:
    """A library that uses what it is asked to use, and computes nothing."""
    if GXX is None or not HEADER.exists():
        pytest.skip("needs g++ and the sources of the kernels")
    results = {"kvkeep_abi": ABI, "kvkeep_best_isa": int(Isa.AVX512_BF16), "kvkeep_use_isa": "isa"}
    names = set(re.findall(r"\b(kvkeep_\w+)\(", HEADER.read_text(encoding="utf-8")))
    assert set(results) < names
    source, path = tmp_path / "stand_in.cpp", tmp_path / "stand_in.so"
    functions = [
        f"int {name}(int isa) {{ return {results.get(name, 0)}; }}" for name in sorted(names)
    ]
    source.write_text('extern "C" {' + "\n".join(functions) + "}", encoding="utf-8")
    subprocess.run([GXX, "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    return path


@pytest.mark.parametrize(("named", "used"), [(None, Isa.AVX512_BF16), ("amx", Isa.AMX)])
def test_amx_is_used_only_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    library_of_a_machine_with_amx: Path,
    named: str | None,
    used: Isa,
) -> None:
    """Also where there is AMX: nobody has measured it yet."""
    monkeypatch.setenv("KVKEEP_NATIVE_LIBRARY", str(library_of_a_machine_with_amx))
    monkeypatch.delenv("KVKEEP_ISA", raising=False)
    if named is not None:
        monkeypatch.setenv("KVKEEP_ISA", named)

    found = load_kernels()

    assert isinstance(found, Kernels)
    assert found.isa is used
