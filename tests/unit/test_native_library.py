"""The library of CPU kernels is found, or its absence has a reason; wrong arguments never reach it."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvkeep.errors import ConfigError, KernelError
from kvkeep.native import Format, Isa, Kernels, KernelsAbsent, ReadKind, kernels, load_kernels
from kvkeep.native import library as native_library
from kvkeep.native.refs import ArenaRef, ItemsRef, arena_ref, items_ref, slots_ref, terms_ref
from kvkeep.native.structs import (
    ABI,
    ArenaStruct,
    ItemsStruct,
    ReturnCode,
    RowsStruct,
    SlotsStruct,
    TermsStruct,
    pack_rows,
)

HEADER = Path(__file__).resolve().parents[2] / "native" / "include" / "kvkeep_native.h"
GXX = shutil.which("g++")
needs_compiler = pytest.mark.skipif(
    GXX is None or not HEADER.exists(), reason="needs g++ and the sources of the kernels"
)


@pytest.fixture
def loaded() -> Kernels:
    """The kernels of this installation."""
    found = load_kernels()
    if isinstance(found, KernelsAbsent):
        pytest.skip(f"no kernels: {found.reason}")
    return found


def build_library(folder: Path, source: str) -> Path:
    """A shared library of that C++ source."""
    assert GXX is not None
    (folder / "stand_in.cpp").write_text(source, encoding="utf-8")
    path = folder / "stand_in.so"
    command = [GXX, "-shared", "-fPIC", "-o", str(path), str(folder / "stand_in.cpp")]
    subprocess.run(command, check=True)
    return path


def absence(monkeypatch: pytest.MonkeyPatch, path: Path) -> str:
    """Why the library at `path` is not used."""
    monkeypatch.setenv("KVKEEP_NATIVE_LIBRARY", str(path))
    found = load_kernels()
    assert isinstance(found, KernelsAbsent)
    return found.reason


def small_arena(**changes: object) -> ArenaRef:
    """Two blocks of 8 tokens, one bf16 layer of 2 heads of 16 dims, but for `changes`."""
    signs_D = torch.ones(16)
    arguments: dict[str, object] = {
        "block_size": 8, "num_kv_heads": 2, "layer_offsets_bytes": [0],
        "k_formats": [Format.BF16], "v_formats": [Format.BF16],
        "k_signs_D": signs_D, "v_signs_D": signs_D,
    }  # fmt: skip
    blocks_NE = torch.zeros(2, 2 * 2 * 8 * 16, dtype=torch.bfloat16)
    return arena_ref(blocks_NE, **(arguments | changes))  # type: ignore[arg-type]  # wrong on purpose


def small_items(**changes: object) -> ItemsRef:
    """One item of two queries at position 6, in rows 0 and 1, reading one block, but for `changes`."""
    arguments: dict[str, object] = {
        "kind": ReadKind.FULL, "window": 0, "num_rows": 2, "rows_I": int32(0),
        "num_queries_I": int32(2), "starts_I": int32(6), "table_firsts_I": int32(0),
        "table_offsets_I1": int32(0, 1), "table_B": int32(1),
    }  # fmt: skip
    return items_ref(**(arguments | changes))  # type: ignore[arg-type]  # wrong on purpose


def int32(*values: int) -> torch.Tensor:
    """A vector of int32."""
    return torch.tensor(values, dtype=torch.int32)


# ------------------------------------------------------------------------------- finding and loading


def test_a_library_that_was_not_built_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation without kernels is no error, and says what to do."""
    monkeypatch.delenv("KVKEEP_NATIVE_LIBRARY", raising=False)
    monkeypatch.setattr(native_library, "_FILE_NAME", "no_such_library.so")

    found = load_kernels()

    assert isinstance(found, KernelsAbsent)
    assert found.reason.startswith("not built; ")


def test_a_named_library_must_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Who names a file means it: falling back in silence would hide the mistake."""
    monkeypatch.setenv("KVKEEP_NATIVE_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(ConfigError, match=r"KVKEEP_NATIVE_LIBRARY=.*none\.so: no such file"):
        load_kernels()


def test_a_file_that_is_no_library_is_absent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The reason names the file and what the loader says."""
    path = tmp_path / "text.so"
    path.write_text("no library", encoding="utf-8")
    assert "text.so cannot be used: " in absence(monkeypatch, path)


@needs_compiler
def test_a_library_of_another_interface_is_absent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its structs may be other ones: nothing but its version is asked."""
    path = build_library(tmp_path, 'extern "C" int kvkeep_abi() { return 999; }')
    assert f"has interface 999, this kvkeep speaks {ABI}" in absence(monkeypatch, path)


@needs_compiler
def test_a_library_that_lacks_a_function_is_absent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is seen when the library is loaded, not in the middle of a step."""
    path = build_library(tmp_path, f'extern "C" int kvkeep_abi() {{ return {ABI}; }}')
    assert "undefined symbol: kvkeep_best_isa" in absence(monkeypatch, path)


@needs_compiler
def test_a_library_whose_symbols_are_nowhere_is_absent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Missing functions are seen at once, not when the first of them is called."""
    source = f'void nowhere(); extern "C" int kvkeep_abi() {{ nowhere(); return {ABI}; }}'
    assert "undefined symbol: _Z7nowherev" in absence(monkeypatch, build_library(tmp_path, source))


@pytest.mark.parametrize("isa", list(Isa))
def test_the_instruction_set_can_be_limited(
    loaded: Kernels, monkeypatch: pytest.MonkeyPatch, isa: Isa
) -> None:
    """KVKEEP_ISA is an upper bound; it does not ask for what the machine does not have."""
    before = loaded.isa
    best = loaded.use_isa(max(Isa))
    monkeypatch.setenv("KVKEEP_ISA", isa.name.lower())
    try:
        limited = load_kernels()
        assert isinstance(limited, Kernels)
        assert limited.isa == min(isa, best)
    finally:
        assert loaded.use_isa(before) == before


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the variable, its value and what there is."""
    monkeypatch.setenv("KVKEEP_ISA", "avx1024")
    with pytest.raises(ConfigError, match=r"KVKEEP_ISA=avx1024: .* portable, avx2, avx512, "):
        load_kernels()


# ------------------------------------------------------------------------------ the interface itself


@needs_compiler
def test_structs_have_the_fields_of_the_header(tmp_path: Path) -> None:
    """Every field has the place and size that the C compiler gives it."""
    names = {
        "KvkeepArena": ArenaStruct,
        "KvkeepRows": RowsStruct,
        "KvkeepSlots": SlotsStruct,
        "KvkeepItems": ItemsStruct,
        "KvkeepTerms": TermsStruct,
    }
    assert set(re.findall(r"^} (\w+);", HEADER.read_text(encoding="utf-8"), re.MULTILINE)) == set(
        names
    )
    prints = [
        f'printf("{name} {field} %zu\\n", offsetof({name}, {field}));'
        for name, struct in names.items()
        for field, *_ in struct._fields_
    ]
    prints += [f'printf("{name} size %zu\\n", sizeof({name}));' for name in names]
    printed = run_with_header(tmp_path, prints)

    expected = [
        f"{name} {field} {getattr(struct, field).offset}"
        for name, struct in names.items()
        for field, *_ in struct._fields_
    ]
    expected += [f"{name} size {ctypes.sizeof(struct)}" for name, struct in names.items()]
    assert printed == expected


def test_packed_rows_are_the_struct() -> None:
    """The quick way of making one gives the bytes of the other."""
    assert pack_rows(1 << 40, -2, 1 << 35, 2) == bytes(RowsStruct(1 << 40, -2, 1 << 35, 2))


@needs_compiler
def test_constants_are_those_of_the_header(tmp_path: Path) -> None:
    """Every constant of the header is known here, by the same name and value."""
    text = HEADER.read_text(encoding="utf-8")
    names = re.findall(r"\bKVKEEP_(\w+) = \d+", text)
    printed = run_with_header(
        tmp_path, [f'printf("{name} %d\\n", KVKEEP_{name});' for name in names]
    )

    members = [*Format, *Isa, *ReadKind, *ReturnCode]
    expected = {f"{member.name} {member.value}" for member in members} | {f"ABI {ABI}"}
    assert set(printed) == expected


def run_with_header(folder: Path, statements: list[str]) -> list[str]:
    """The lines that a C++ program of these statements prints."""
    assert GXX is not None
    includes = f'#include <cstddef>\n#include <cstdio>\n#include "{HEADER}"\n'
    source = folder / "layout.cpp"
    source.write_text(includes + "int main() {" + "\n".join(statements) + "}", encoding="utf-8")
    subprocess.run([GXX, str(source), "-o", str(folder / "layout")], check=True)
    done = subprocess.run([str(folder / "layout")], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


# ---------------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: small_arena(layer_offsets_bytes=[4]), "layer offset 4: .* within 1024 bytes"),
        (lambda: small_arena(layer_offsets_bytes=[-4]), "layer offset -4"),
        (
            lambda: small_arena(layer_offsets_bytes=[2], v_formats=[Format.INT8]),
            "layer offset 2: .* a multiple of 4",
        ),
        (lambda: small_arena(k_formats=[Format.F32]), "2 heads of 768 bytes must"),
        (lambda: small_arena(k_formats=[]), "1 offsets, 0 and 1 formats"),
        (lambda: small_arena(k_signs_D=torch.ones(16).double()), "k_signs_D is torch.float64"),
        (lambda: slots_ref(torch.zeros(2).long(), torch.zeros(3).long()), "offsets_T has shape"),
        (lambda: slots_ref(torch.zeros(2), torch.zeros(2)), "blocks_T is torch.float32"),
        (lambda: slots_ref(torch.zeros(4).long()[::2], torch.zeros(2).long()), r"strides \(2,\)"),
        (lambda: small_items(starts_I=int32(6, 7)), r"starts_I has shape \(2,\)"),
        (lambda: small_items(rows_I=torch.zeros(1).long()), "rows_I is torch.int64"),
        (lambda: small_items(table_offsets_I1=int32(0, 2)), r"\[0, 2\] does not go up from 0 to 1"),
        (lambda: small_items(table_offsets_I1=int32(1, 1)), r"\[1, 1\] does not go up from 0 to 1"),
        (lambda: terms_ref(1.0, sinks_H=torch.ones(2).half()), "sinks_H is torch.float16"),
        (
            lambda: terms_ref(1.0, sinks_H=torch.ones(2), alibi_slopes_H=torch.ones(3)),
            "alibi_slopes_H has shape",
        ),
    ],
)
def test_what_cannot_be_described_is_refused(build: Callable[[], object], message: str) -> None:
    """The message names the argument and what it was."""
    with pytest.raises(KernelError, match=message):
        build()


def test_tables_that_go_back_are_refused() -> None:
    """Between a first and a last offset that are right, one may still point behind the table."""
    items = {name: int32(0, 0) for name in ("rows_I", "starts_I", "table_firsts_I")}
    with pytest.raises(KernelError, match=r"\[0, 9, 1\] does not go up"):
        small_items(**items, num_queries_I=int32(1, 1), table_offsets_I1=int32(0, 9, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table_B": int32(2)}, "check_items: out_of_bounds: items=1, rows=2, .*num_blocks=2"),
        ({"table_B": int32(-1)}, "out_of_bounds"),
        ({"num_rows": 1}, "out_of_bounds: items=1, rows=1"),
        ({"starts_I": int32(8)}, "out_of_bounds"),
        ({"num_queries_I": int32(17), "num_rows": 17}, "bad_argument"),
    ],
)
def test_items_outside_of_the_arena_are_refused(
    loaded: Kernels, changes: dict[str, object], message: str
) -> None:
    """A block, row or position that does not exist is an error before anything is read."""
    arena = small_arena()
    loaded.check_items(arena, small_items())
    with pytest.raises(KernelError, match=message):
        loaded.check_items(arena, small_items(**changes))


@pytest.mark.parametrize(("block", "offset"), [(2, 0), (-1, 0), (0, 8), (0, -1)])
def test_slots_outside_of_the_arena_are_refused(loaded: Kernels, block: int, offset: int) -> None:
    """Neither side of either bound is let through."""
    arena = small_arena()
    loaded.check_slots(arena, slots_ref(torch.tensor([1]), torch.tensor([7])))
    with pytest.raises(KernelError, match="check_slots: out_of_bounds: slots=1"):
        loaded.check_slots(arena, slots_ref(torch.tensor([block]), torch.tensor([offset])))


def test_tensors_of_the_wrong_shape_never_reach_a_kernel(loaded: Kernels) -> None:
    """Each tensor is held against the arena, the slots or the items it goes with."""
    arena, items = small_arena(), small_items()
    slots = slots_ref(torch.tensor([0]), torch.tensor([0]))
    right_TKD, terms = torch.ones(1, 2, 16), terms_ref(1.0)
    q_THD = torch.ones(2, 4, 16)

    with pytest.raises(KernelError, match=r"k_TKD is \(2, 2, 16\) .* shape \(1, 2, 16\)"):
        loaded.write(arena, 0, slots, torch.ones(2, 2, 16), right_TKD)
    with pytest.raises(KernelError, match=r"v_TKD is .* float64"):
        loaded.read(arena, 0, slots, right_TKD, right_TKD.double())
    with pytest.raises(KernelError, match=r"v_TKD .* strides \(64, 32, 2\)"):
        loaded.write(arena, 0, slots, right_TKD, torch.ones(1, 2, 32)[:, :, ::2])
    with pytest.raises(KernelError, match=r"out_THD is \(1, 4, 16\)"):
        loaded.attend(arena, 0, items, terms, q_THD, q_THD[:1])
    with pytest.raises(KernelError, match=r"attend: bad_argument: .* float32 .* float16 "):
        loaded.attend(arena, 0, items, terms, q_THD, q_THD.half())
    with pytest.raises(KernelError, match="terms for 3 heads"):
        loaded.attend(arena, 0, items, terms_ref(1.0, sinks_H=torch.ones(3)), q_THD, q_THD)
    with pytest.raises(KernelError, match="attend: bad_argument: layer=1"):
        loaded.attend(arena, 1, items, terms, q_THD, torch.empty_like(q_THD))


def test_matrices_of_the_wrong_shape_never_reach_a_kernel(loaded: Kernels) -> None:
    """A linear layer's tensors are bf16, contiguous and fit each other."""
    weight_NK, x_MK = torch.ones(8, 4).bfloat16(), torch.ones(2, 4).bfloat16()
    out_MN = torch.empty(2, 8).bfloat16()

    loaded.linear(weight_NK, None, x_MK, out_MN)

    assert torch.equal(out_MN, torch.full((2, 8), 4.0).bfloat16())
    with pytest.raises(KernelError, match=r"weight_NK \(8, 4\) .* x_XK \(2, 3\)"):
        loaded.linear(weight_NK, None, x_MK[:, :3], out_MN)
    with pytest.raises(KernelError, match=r"out_XN .* float32"):
        loaded.linear(weight_NK, None, x_MK, out_MN.float())
    with pytest.raises(KernelError, match=r"weight_NK \(8, 4\) .* strides \(1, 8\)"):
        loaded.linear(weight_NK.reshape(4, 8).T, None, x_MK, out_MN)
    with pytest.raises(KernelError, match=r"bias_N \(4,\)"):
        loaded.linear(weight_NK, x_MK[0], x_MK, out_MN)


def test_a_number_of_threads_is_positive(loaded: Kernels) -> None:
    """Zero threads would compute nothing and say nothing."""
    with pytest.raises(KernelError, match="num_threads=0"):
        loaded.num_threads = 0


def test_more_rows_than_a_kernel_takes_are_refused(loaded: Kernels) -> None:
    """The limit that callers plan with is the limit of the library."""
    weight_NK = torch.ones(8, 8).bfloat16()
    x_MK = torch.ones(kernels.MOST_ROWS + 1, 8).bfloat16()
    loaded.linear(weight_NK, None, x_MK[:-1], torch.empty_like(x_MK[:-1]))
    with pytest.raises(KernelError, match="linear: bad_argument"):
        loaded.linear(weight_NK, None, x_MK, torch.empty_like(x_MK))


# -------------------------------------------------------------------------------- threads of torch

_THREADS = """
import os, torch
from kvkeep.native import Kernels, load_kernels

torch.set_num_threads(3)

def num_threads():
    return len(os.listdir("/proc/self/task"))

def use_torch():
    for _ in range(3):
        torch.ones(1 << 22).exp()

use_torch()
before = num_threads()
kernels = load_kernels()
assert isinstance(kernels, Kernels), kernels
kernels.num_threads = 3
weight_NK = torch.ones(4096, 512).bfloat16()
for _ in range(3):
    kernels.linear(weight_NK, None, torch.ones(4, 512).bfloat16(), torch.empty(4, 4096).bfloat16())
    use_torch()
files = {line.split()[-1] for line in open("/proc/self/maps") if "/libgomp" in line or "/libiomp" in line}
print(before, num_threads(), len(files), *files)
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_kernels_and_torch_share_one_pool_of_threads(loaded: Kernels) -> None:
    """No second OpenMP runtime is loaded, and no thread is started that torch does not use as well."""
    environment = os.environ | {"OMP_NUM_THREADS": "3"}
    command = [sys.executable, "-W", "error", "-c", _THREADS]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    before, after, num_files, *files = done.stdout.split()

    assert int(num_files) == 1, files
    assert int(before) == int(after) > 1
