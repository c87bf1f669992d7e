"""Huge pages: attention jumps from block to block, and each small page is one more to find."""

import ctypes
import sys

from torch import Tensor

__all__ = ["advise_huge_pages"]

_HUGE_PAGE_BYTES = 2 << 20
_MADV_HUGEPAGE = 14


def advise_huge_pages(storage: Tensor) -> None:
    """Ask Linux for huge pages in memory that nothing was written to yet; elsewhere nothing happens.

    Where they are switched off or short the pages stay small, which is slower and nothing else.
    """
    if not storage.is_cpu or not sys.platform.startswith("linux"):
        return
    begin = -(-storage.data_ptr() // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    end = (storage.data_ptr() + storage.nbytes) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
    if end > begin:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        madvise(begin, end - begin, _MADV_HUGEPAGE)
