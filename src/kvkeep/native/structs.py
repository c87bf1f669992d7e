"""The structs and constants of `native/include/kvkeep_native.h`, which says what each field means."""

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum
from struct import Struct

__all__ = ["ABI", "ArenaStruct", "Format", "Isa", "ItemsStruct", "ReadKind"]
__all__ += ["ReturnCode", "RowsStruct", "SlotsStruct", "TermsStruct", "pack_rows"]

ABI = 2


class Format(IntEnum):
    """How an element is stored: F32, F16 and BF16 are also what a model's tensors may be."""

    F32 = 0
    F16 = 1
    BF16 = 2
    FP8 = 3
    INT8 = 4
    INT4 = 5


class Isa(IntEnum):
    """Instruction sets, each containing the ones before it. AMX is used only where it is asked for."""

    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3
    AMX = 4


class ReadKind(IntEnum):
    """Which earlier positions a query reads."""

    FULL = 0
    SLIDING = 1
    CHUNKED = 2


class ReturnCode(IntEnum):
    """What a function of the library returns."""

    OK = 0
    BAD_ARGUMENT = 1
    OUT_OF_BOUNDS = 2
    NO_MEMORY = 3


class ArenaStruct(Structure):
    """KvkeepArena."""

    _fields_ = (
        ("base", c_void_p),
        ("num_blocks", c_int64),
        ("block_bytes", c_int64),
        ("block_size", c_int32),
        ("num_layers", c_int32),
        ("num_kv_heads", c_int32),
        ("k_dim", c_int32),
        ("v_dim", c_int32),
        ("layer_offsets", c_void_p),
        ("k_formats", c_void_p),
        ("v_formats", c_void_p),
        ("k_signs", c_void_p),
        ("v_signs", c_void_p),
        ("first_blocks", c_void_p),
    )


class RowsStruct(Structure):
    """KvkeepRows."""

    _fields_ = (
        ("data", c_void_p),
        ("row_stride", c_int64),
        ("head_stride", c_int64),
        ("dtype", c_int32),
    )


# A RowsStruct as bytes, which are made in a fraction of the time; every call needs two.
pack_rows = Struct("@Pqqi0q").pack


class SlotsStruct(Structure):
    """KvkeepSlots."""

    _fields_ = (
        ("num_slots", c_int64),
        ("blocks", c_void_p),
        ("offsets", c_void_p),
    )


class ItemsStruct(Structure):
    """KvkeepItems."""

    _fields_ = (
        ("num_items", c_int32),
        ("kind", c_int32),
        ("window", c_int32),
        ("rows", c_void_p),
        ("num_queries", c_void_p),
        ("starts", c_void_p),
        ("table_firsts", c_void_p),
        ("table_offsets", c_void_p),
        ("table", c_void_p),
    )


class TermsStruct(Structure):
    """KvkeepTerms."""

    _fields_ = (
        ("scaling", c_float),
        ("softcap", c_float),
        ("sinks", c_void_p),
        ("alibi_slopes", c_void_p),
    )
