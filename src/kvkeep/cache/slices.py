"""Long work in bits, done for some milliseconds at a time, so that no step waits for the whole of it."""

from collections.abc import Generator
from time import thread_time
from typing import Generic, TypeAlias, TypeVar

__all__ = ["Bits", "Sliced", "to_end"]

T = TypeVar("T")

# Work that can be interrupted at every `yield`, and returns what it has found.
Bits: TypeAlias = Generator[None, None, T]
_SLICE_S = 0.004


class Sliced(Generic[T]):
    """Goes on with bits of work whenever it is told to."""

    def __init__(self, bits: Bits[T]) -> None:
        self._bits = bits
        self._results: list[T] = []

    @property
    def result(self) -> T:
        """What was found; once all is done."""
        return self._results[0]

    def go_on(self) -> bool:
        """Work for a few milliseconds; whether all is done. Raises what the work raises."""
        until_s = thread_time() + _SLICE_S
        while not self._results:
            try:
                next(self._bits)
            except StopIteration as end:
                self._results.append(end.value)
                break
            if thread_time() > until_s:
                return False
        return True


def to_end(bits: Bits[T]) -> T:
    """All of the work in one go, for who has nobody waiting."""
    work = Sliced(bits)
    while not work.go_on():
        pass
    return work.result
