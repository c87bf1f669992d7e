"""Lists of byte views: objects lie in several pieces of memory, and move in others."""

from collections.abc import Iterable, Sequence

__all__ = ["byte_views", "last_bytes", "rest_of", "scatter"]


def byte_views(views: Iterable[memoryview]) -> list[memoryview]:
    """The same memory as views of single bytes; empty ones are left out."""
    return [
        view if view.ndim == 1 and view.format == "B" else view.cast("B")
        for view in views
        if view.nbytes
    ]


def rest_of(views: Sequence[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of byte views after their first `num_bytes`.

    >>> [bytes(view) for view in rest_of([memoryview(b"abc"), memoryview(b"de")], 1)]
    [b'bc', b'de']
    """
    rest = []
    for view in views:
        if num_bytes >= len(view):
            num_bytes -= len(view)
        else:
            rest.append(view[num_bytes:] if num_bytes else view)
            num_bytes = 0
    return rest


def last_bytes(views: Sequence[memoryview], num_bytes: int) -> bytes:
    """The last `num_bytes` of byte views, or all they have.

    >>> last_bytes([memoryview(b"abc"), memoryview(b"de")], 3)
    b'cde'
    """
    found = b""
    for view in reversed(views):
        left = num_bytes - len(found)
        if not left:
            break
        found = bytes(view[-left:]) + found
    return found


def scatter(source: memoryview, views: Sequence[memoryview]) -> None:
    """Copy `source` into byte views that are as long together."""
    start = 0
    for view in views:
        view[:] = source[start : start + len(view)]
        start += len(view)
