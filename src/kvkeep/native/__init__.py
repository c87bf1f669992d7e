"""The compiled CPU kernels, seen from Python; the only place that knows ctypes.

The kernels live in `native/` as a shared library with a plain C interface. They are optional: without a
compiler kvkeep is installed without them, and `load_kernels` says why they are absent.
"""

from kvkeep.native.huge_pages import advise_huge_pages
from kvkeep.native.kernels import MOST_QUERIES, MOST_ROWS, Kernels, load_kernels
from kvkeep.native.library import KernelsAbsent
from kvkeep.native.refs import MOST_DIM, ArenaRef, ItemsRef, SlotsRef, TermsRef
from kvkeep.native.structs import Format, Isa, ReadKind

__all__ = [
    "MOST_DIM",
    "MOST_QUERIES",
    "MOST_ROWS",
    "ArenaRef",
    "Format",
    "Isa",
    "ItemsRef",
    "Kernels",
    "KernelsAbsent",
    "ReadKind",
    "SlotsRef",
    "TermsRef",
    "advise_huge_pages",
    "load_kernels",
]
