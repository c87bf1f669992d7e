"""Finding and loading the shared library of CPU kernels."""

import ctypes
import os
from collections.abc import Callable
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch

from kvkeep.errors import ConfigError
from kvkeep.native.structs import ABI, Isa

__all__ = ["ISA_VARIABLE", "LIBRARY_VARIABLE", "KernelsAbsent", "Library", "load_library"]

LIBRARY_VARIABLE = "KVKEEP_NATIVE_LIBRARY"
ISA_VARIABLE = "KVKEEP_ISA"

_FILE_NAME = "libkvkeep_kernels.so"

# Structs go by their address, and rows as bytes: typed pointers take ctypes twice the time of a whole call.
_NAME_TO_ARGUMENTS = {
    "kvkeep_abi": (),
    "kvkeep_best_isa": (),
    "kvkeep_use_isa": (c_int32,),
    "kvkeep_check_items": (c_void_p, c_void_p, c_int64),
    "kvkeep_check_slots": (c_void_p, c_void_p),
    "kvkeep_write": (c_void_p, c_int32, c_void_p, c_char_p, c_char_p, c_int32),
    "kvkeep_read": (c_void_p, c_int32, c_void_p, c_char_p, c_char_p, c_int32),
    "kvkeep_attend": (
        c_void_p, c_int32, c_void_p, c_void_p, c_int32, c_char_p, c_char_p, c_int32,
    ),
    "kvkeep_attend_latent": (
        c_void_p, c_int32, c_void_p, c_void_p, c_int32, c_char_p, c_char_p, c_int32,
    ),
    "kvkeep_linear": (
        c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int32, c_int32,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class KernelsAbsent:
    """Why there are no kernels on this machine."""

    reason: str


@dataclass(frozen=True, slots=True)
class Library:
    """The loaded library, its functions declared, and the instruction set that it uses.

    That choice belongs to the library: who loads it again with another limit changes it for all. So does
    `measured`, what was measured of the functions in this process: however often it is loaded, a file is one
    library.
    """

    functions: ctypes.CDLL
    isa: Isa
    measured: dict[Any, Any]


def load_library() -> Library | KernelsAbsent:
    """Load the library that was installed with kvkeep, or the one that KVKEEP_NATIVE_LIBRARY names.

    KVKEEP_ISA keeps it to an instruction set and those below it, and AMX is used only where it says so.
    Raises ConfigError when one of the two has a value it cannot have; a library that was not built, or cannot
    be used, is a KernelsAbsent.
    """
    limit = _isa_limit()
    path = _library_path()
    if isinstance(path, KernelsAbsent):
        return path
    _share_openmp_runtime()
    try:
        functions = ctypes.CDLL(str(path))
        abi = _declare(functions, "kvkeep_abi")()
        if abi != ABI:
            return KernelsAbsent(f"{path} has interface {abi}, this kvkeep speaks {ABI}")
        for name in _NAME_TO_ARGUMENTS:
            _declare(functions, name)
    except (OSError, AttributeError) as error:  # not loadable; a function is missing
        return KernelsAbsent(f"{path} cannot be used: {error}")
    if limit is None:
        limit = Isa(functions.kvkeep_best_isa())
    return Library(functions, Isa(functions.kvkeep_use_isa(limit)), _measured(path))


@cache
def _measured(_path: Path) -> dict[Any, Any]:
    """What was measured of the library in that file; nothing at first."""
    return {}


def _isa_limit() -> Isa | None:
    """What KVKEEP_ISA says, if anything."""
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted is None:
        return None
    try:
        return Isa[wanted.upper()]
    except KeyError:
        known = ", ".join(isa.name.lower() for isa in Isa)
        raise ConfigError(
            f"{ISA_VARIABLE}={wanted}: no such instruction set; one of {known}"
        ) from None


def _library_path() -> Path | KernelsAbsent:
    named = os.environ.get(LIBRARY_VARIABLE)
    if named is not None:
        path = Path(named)
        if not path.is_file():
            raise ConfigError(
                f"{LIBRARY_VARIABLE}={named}: no such file; unset it, or build the library"
            )
        return path.resolve()
    # An editable install keeps the sources and what was built in two folders; resources know both.
    with resources.as_file(resources.files("kvkeep.native") / _FILE_NAME) as path:
        if path.is_file():
            return path
    return KernelsAbsent("not built; install kvkeep where g++ is, and read what pip says with -v")


def _declare(functions: ctypes.CDLL, name: str) -> Callable[..., int]:
    function = getattr(functions, name)
    function.argtypes = _NAME_TO_ARGUMENTS[name]
    function.restype = c_int32
    return cast("Callable[..., int]", function)


def _share_openmp_runtime() -> None:
    """Let the library's OpenMP calls bind to the runtime that torch uses.

    The library names no runtime, because torch's has no certain file name, and a second runtime would be a
    second pool of threads on the same cores.
    """
    try:
        ctypes.CDLL(_openmp_of_torch() or "libgomp.so.1", ctypes.RTLD_GLOBAL)
    except OSError:
        return  # then loading the library names the missing function


def _openmp_of_torch() -> str | None:
    """The file of the function that torch's own parallel loops call; None where that is unknown."""
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(torch_cpu)).GOMP_parallel
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except (OSError, AttributeError):
        return None
    address = ctypes.cast(function, c_void_p).value or 0
    for line in maps.splitlines():
        first, _, last = line.split(maxsplit=1)[0].partition("-")
        if int(first, 16) <= address < int(last, 16):
            return line.split(maxsplit=5)[5]
    return None
