"""What is still on its way when somebody is erased must not be kept when it arrives."""

from collections.abc import Collection
from dataclasses import dataclass
from weakref import WeakSet

__all__ = ["Erasures", "Watch"]


@dataclass(eq=False, slots=True, weakref_slot=True)
class Watch:
    """Of something that is being made under a salt: `is_erased` once what the salt has was erased."""

    salt: str | None
    is_erased: bool = False


class Erasures:
    """Tells watches of erasures, for as long as somebody holds them. Used by the event loop alone."""

    def __init__(self) -> None:
        self._watches: WeakSet[Watch] = WeakSet()

    def watch(self, salt: str | None) -> Watch:
        """A watch that begins now."""
        watch = Watch(salt)
        self._watches.add(watch)
        return watch

    def begin(self, salts: Collection[str | None]) -> None:
        """From now on nothing is kept that was begun before under one of these salts."""
        for watch in self._watches:
            watch.is_erased |= watch.salt in salts
