"""The kernels as functions of torch tensors.

Every method checks what would otherwise read or write outside of a tensor, and costs a few microseconds.
Methods may be called from several threads. Legend: T rows (tokens), H query heads, K key/value heads, D head
size; M rows, K inputs and N outputs of a linear layer, X any leading dims of M rows together.
"""

from collections.abc import Callable
from ctypes import c_void_p
from math import prod
from typing import Any, NoReturn

import torch
from torch import Tensor

from kvkeep.errors import KernelError
from kvkeep.native.library import KernelsAbsent, Library, load_library
from kvkeep.native.refs import (
    ArenaRef,
    ItemsRef,
    SlotsRef,
    TermsRef,
    arena_ref,
    items_ref,
    slots_ref,
    terms_ref,
    with_first_blocks,
)
from kvkeep.native.structs import ArenaStruct, Format, Isa, ReturnCode, pack_rows

__all__ = ["MOST_QUERIES", "MOST_ROWS", "Kernels", "load_kernels"]

# Queries of an item; rows of a linear layer's input.
MOST_QUERIES = 16
MOST_ROWS = 32

_BF16 = torch.bfloat16
_DTYPE_TO_FORMAT = {
    torch.float32: int(Format.F32),
    torch.float16: int(Format.F16),
    torch.bfloat16: int(Format.BF16),
}


def load_kernels() -> "Kernels | KernelsAbsent":
    """The kernels of this installation; see load_library."""
    library = load_library()
    return library if isinstance(library, KernelsAbsent) else Kernels(library)


class Kernels:
    """The loaded kernels. `isa` is the instruction set that they use, `num_threads` how many threads."""

    arena = staticmethod(arena_ref)
    with_first_blocks = staticmethod(with_first_blocks)
    slots = staticmethod(slots_ref)
    items = staticmethod(items_ref)
    terms = staticmethod(terms_ref)

    def __init__(self, library: Library) -> None:
        self.isa = library.isa
        functions = library.functions
        self._use_isa = functions.kvkeep_use_isa
        self._check_items = functions.kvkeep_check_items
        self._check_slots = functions.kvkeep_check_slots
        self._write = functions.kvkeep_write
        self._read = functions.kvkeep_read
        self._attend = functions.kvkeep_attend
        self._attend_latent = functions.kvkeep_attend_latent
        self._linear = functions.kvkeep_linear
        self._measured = library.measured
        self._num_threads = torch.get_num_threads()

    @property
    def linear_trials(self) -> dict[Any, Any]:
        """What was measured of `linear` in this process, with this instruction set and number of threads.

        Keys and values are those of who measures; a library that is loaded again has the same ones.
        """
        trials: dict[Any, Any] = self._measured.setdefault((self.isa, self._num_threads), {})
        return trials

    @property
    def num_threads(self) -> int:
        """Threads of each call; set it to torch.get_num_threads() when a step begins."""
        return self._num_threads

    @num_threads.setter
    def num_threads(self, num_threads: int) -> None:
        """Raise KernelError unless the number is positive."""
        if num_threads < 1:
            raise KernelError(f"num_threads={num_threads} is not a positive number")
        self._num_threads = num_threads

    def use_isa(self, limit: Isa) -> Isa:
        """Use no instruction set better than `limit` from now on, in the whole process; the one in use."""
        self.isa = Isa(self._use_isa(limit))
        return self.isa

    def check_items(self, arena: ArenaRef, items: ItemsRef) -> None:
        """Raise KernelError unless all blocks that items read and all their rows exist."""
        code = self._check_items(arena.address, items.address, items.num_rows)
        if code:
            _refuse("check_items", code, items=items.num_items, rows=items.num_rows, arena=arena)

    def check_slots(self, arena: ArenaRef, slots: SlotsRef) -> None:
        """Raise KernelError unless all slots lie in the arena."""
        code = self._check_slots(arena.address, slots.address)
        if code:
            _refuse("check_slots", code, slots=slots.num_slots, arena=arena)

    def write(
        self, arena: ArenaRef, layer: int, slots: SlotsRef, k_TKD: Tensor, v_TKD: Tensor
    ) -> None:
        """Encode rows i of k and v into slots i of a layer; slots were checked and are distinct."""
        shape = (slots.num_slots, arena.num_kv_heads)
        code = self._write(
            arena.address, layer, slots.address,
            _rows("k_TKD", k_TKD, (*shape, arena.k_dim)),
            _rows("v_TKD", v_TKD, (*shape, arena.v_dim)),
            self._num_threads,
        )  # fmt: skip
        if code:
            _refuse(
                "write", code, layer=layer, slots=slots.num_slots, k=k_TKD, v=v_TKD, arena=arena
            )

    def read(
        self, arena: ArenaRef, layer: int, slots: SlotsRef, k_TKD: Tensor, v_TKD: Tensor
    ) -> None:
        """Decode slots i of a layer into rows i of k and v; slots were checked."""
        shape = (slots.num_slots, arena.num_kv_heads)
        code = self._read(
            arena.address, layer, slots.address,
            _rows("k_TKD", k_TKD, (*shape, arena.k_dim)),
            _rows("v_TKD", v_TKD, (*shape, arena.v_dim)),
            self._num_threads,
        )  # fmt: skip
        if code:
            _refuse("read", code, layer=layer, slots=slots.num_slots, k=k_TKD, v=v_TKD, arena=arena)

    def attend(
        self,
        arena: ArenaRef,
        layer: int,
        items: ItemsRef,
        terms: TermsRef,
        q_THD: Tensor,
        out_THD: Tensor,
    ) -> None:
        """Attention of all items over a layer, into the items' rows of `out_THD`; items were checked.

        q has the arena's k_dim, out its v_dim, both one dtype. What an item gets does not depend, to the
        last bit, on the other items or on num_threads.
        """
        dims = (arena.k_dim, arena.v_dim)
        self._attend_with(self._attend, dims, arena, layer, items, terms, (q_THD, out_THD))

    def attend_latent(
        self,
        arena: ArenaRef,
        layer: int,
        items: ItemsRef,
        terms: TermsRef,
        q_THD: Tensor,
        out_THD: Tensor,
    ) -> None:
        """The same over MLA latents: the arena's keys, whose rotated dims are its values.

        q has k_dim + v_dim dims, those absorbed into the latent first; out has the latent's k_dim.
        """
        dims = (arena.k_dim + arena.v_dim, arena.k_dim)
        self._attend_with(self._attend_latent, dims, arena, layer, items, terms, (q_THD, out_THD))

    def _attend_with(
        self,
        function: Callable[..., int],
        dims: tuple[int, int],
        arena: ArenaRef,
        layer: int,
        items: ItemsRef,
        terms: TermsRef,
        rows: tuple[Tensor, Tensor],
    ) -> None:
        q_THD, out_THD = rows
        num_heads = q_THD.shape[1]
        if terms.num_heads is not None and terms.num_heads != num_heads:
            raise KernelError(f"q_THD {_describe(q_THD)}, but terms for {terms.num_heads} heads")
        code = function(
            arena.address, layer, items.address, terms.address, num_heads,
            _rows("q_THD", q_THD, (items.num_rows, num_heads, dims[0])),
            _rows("out_THD", out_THD, (items.num_rows, num_heads, dims[1])),
            self._num_threads,
        )  # fmt: skip
        if code:
            found = {"layer": layer, "items": items.num_items, "q": q_THD, "out": out_THD}
            _refuse("attend", code, **found, arena=arena)

    def linear(
        self, weight_NK: Tensor, bias_N: Tensor | None, x_XK: Tensor, out_XN: Tensor
    ) -> None:
        """Compute out = x @ weight.T + bias for up to MOST_ROWS rows; all bf16, contiguous."""
        num_outputs, num_inputs = weight_NK.shape
        *leading, num_columns = x_XK.shape
        if num_columns != num_inputs or not (_is_dense(weight_NK) and _is_dense(x_XK)):
            _refuse_matrices(weight_NK, x_XK)
        if out_XN.shape != (*leading, num_outputs) or not _is_dense(out_XN):
            _refuse_matrices(weight_NK, x_XK, out_XN=out_XN)
        if bias_N is not None and (bias_N.shape != (num_outputs,) or not _is_dense(bias_N)):
            _refuse_matrices(weight_NK, x_XK, bias_N=bias_N)
        code = self._linear(
            weight_NK.data_ptr(), None if bias_N is None else bias_N.data_ptr(),
            x_XK.data_ptr(), out_XN.data_ptr(),
            num_outputs, num_inputs, prod(leading), self._num_threads,
        )  # fmt: skip
        if code:
            _refuse("linear", code, weight=weight_NK, x=x_XK)


def _rows(name: str, rows: Tensor, shape: tuple[int, int, int]) -> bytes:
    dtype = _DTYPE_TO_FORMAT.get(rows.dtype)
    if dtype is None or rows.shape != shape or not rows.is_cpu:
        raise KernelError(f"{name} is {_describe(rows)}; give floats of shape {shape} on the CPU")
    row_stride, head_stride, dim_stride = rows.stride()
    if dim_stride != 1:
        raise KernelError(f"{name} is {_describe(rows)}; the last dim must be contiguous")
    return pack_rows(rows.data_ptr(), row_stride, head_stride, dtype)


def _is_dense(matrix: Tensor) -> bool:
    return matrix.dtype is _BF16 and matrix.is_cpu and matrix.is_contiguous()


def _refuse_matrices(weight_NK: Tensor, x_XK: Tensor, **others: Tensor) -> NoReturn:
    matrices = {"weight_NK": weight_NK, "x_XK": x_XK} | others
    found = [f"{name} {_describe(matrix)}" for name, matrix in matrices.items()]
    raise KernelError(f"{', '.join(found)}: not contiguous bf16 on the CPU of shapes that fit")


def _describe(tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{tuple(tensor.shape)} {dtype} on {tensor.device}, strides {tensor.stride()}"


def _refuse(function: str, code: int, **arguments: object) -> NoReturn:
    """Raise what a return code means, with the arguments that led to it."""
    shown = ", ".join(f"{name}={_shown(value)}" for name, value in arguments.items())
    raise KernelError(f"{function}: {ReturnCode(code).name.lower()}: {shown}")


def _shown(value: object) -> object:
    if isinstance(value, ArenaRef):
        sizes = [name for name, kind, *_ in ArenaStruct._fields_ if kind is not c_void_p]
        return "(" + " ".join(f"{name}={getattr(value.struct, name)}" for name in sizes) + ")"
    return _describe(value) if isinstance(value, Tensor) else value
