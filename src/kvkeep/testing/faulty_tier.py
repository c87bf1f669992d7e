"""A tier that fails on purpose: for tests of whatever stands on tiers, ours and other people's.

    tier = FaultyTier(HostTier(2**20), [Fault("flip", "get", probability=0.1)], seed=7)

Faults are drawn from the seed, the operation, the key and how often that key was asked for, so that a run can
be repeated whatever the order of its threads.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from difflib import get_close_matches
from enum import StrEnum
from threading import Condition, Lock

import xxhash

from kvkeep.errors import ConfigError
from kvkeep.spec import StoredKey
from kvkeep.tiers.base import Got, Miss, MissCause, Presence, PutOutcome, Tier
from kvkeep.tiers.wrapper import TierWrapper

__all__ = ["Fault", "FaultKind", "FaultyTier"]


class FaultKind(StrEnum):
    """What can go wrong. The last four are silent: the answer looks right."""

    FAIL = "fail"  # find: absent, get: UNAVAILABLE, put: FAILED, delete, relabel: nothing happens
    DELAY = "delay"  # `delay_s` pass first
    HANG = "hang"  # nothing happens before `release`
    TRUNCATE = "truncate"  # get: SHORT; put: "stored", but the last byte is missing
    FLIP = "flip"  # get, put: one bit is another
    SWAP = "swap"  # get, put: the bytes of another object of the same length, where there is one
    VANISH = (
        "vanish"  # get, put, find: right after the answer, or before it for get, the object is gone
    )


_OPERATIONS = ("find", "get", "put", "delete", "relabel")
_KIND_TO_OPERATIONS: Mapping[FaultKind, Sequence[str]] = {
    FaultKind.TRUNCATE: ("get", "put"),
    FaultKind.FLIP: ("get", "put"),
    FaultKind.SWAP: ("get", "put"),
    FaultKind.VANISH: ("find", "get", "put"),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of fault of one operation ("find", "get", "put", "delete" or "relabel").

    It happens to the calls numbered in `calls`, from 0, of that operation on the tier; to others with
    `probability`, for each key on its own. Raises ConfigError for what cannot be.
    """

    kind: str
    operation: str
    _: KW_ONLY
    probability: float = 0.0
    calls: Collection[int] = ()
    delay_s: float = 0.05

    def __post_init__(self) -> None:
        kind = FaultKind(_one_of("kind", self.kind, [str(kind) for kind in FaultKind]))
        _one_of("operation", self.operation, _KIND_TO_OPERATIONS.get(kind, _OPERATIONS))
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"probability={self.probability!r} is none; give 0 to 1")
        if not self.delay_s >= 0:
            raise ConfigError(f"delay_s={self.delay_s!r} is no time; give seconds, 0 or more")


class FaultyTier(TierWrapper):
    """A tier around which things go wrong. Of several faults that meet, the first of `faults` happens.

    `sleep` stands in for waiting in tests of deadlines. Closing the tier lets hanging calls go.
    """

    def __init__(
        self,
        tier: Tier,
        faults: Sequence[Fault],
        *,
        seed: int = 0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(tier)
        self._faults = tuple(faults)
        self._seed = seed
        self._sleep = sleep
        self._lock = Lock()
        self._num_calls: Counter[str] = Counter()
        self._num_asked: Counter[tuple[str, StoredKey]] = Counter()
        self._happened: Counter[tuple[str, str]] = Counter()
        self._key_to_bytes: dict[StoredKey, int] = {}
        self._gate = Condition()
        self._is_held = True
        self._num_hanging = 0
        self._num_unreached = 0

    @property
    def num_happened(self) -> dict[str, int]:
        """How often each fault happened, by "operation kind": {"get flip": 3}."""
        with self._lock:
            return {f"{of} {kind}": count for (of, kind), count in self._happened.items()}

    @property
    def num_hanging(self) -> int:
        """Calls that wait for `release`."""
        return self._num_hanging

    def replace_faults(self, faults: Sequence[Fault]) -> None:
        """Have other faults from now on; none heals the tier. Calls that hang go on hanging."""
        self._faults = tuple(faults)

    def release(self) -> None:
        """Let hanging calls go on, and later ones not hang until `hang_again`."""
        with self._gate:
            self._is_held = False
            self._gate.notify_all()

    def hang_again(self) -> None:
        """Let calls hang again after a `release`; at first they do."""
        with self._gate:
            self._is_held = True

    def find(self, keys: Sequence[StoredKey]) -> list[Presence]:
        call = self._begin("find")
        faults = [self._draw("find", key, call) for key in keys]
        for kind in (FaultKind.DELAY, FaultKind.HANG):
            # One round trip waits once, however many of its keys are slow.
            self._wait(next((fault for fault in faults if fault and fault.kind == kind), None))
        presences = self.inner.find(keys)
        for at, (key, fault) in enumerate(zip(keys, faults, strict=True)):
            if fault is not None and fault.kind == FaultKind.FAIL:
                presences[at] = Presence.ABSENT
            if fault is not None and fault.kind == FaultKind.VANISH:
                self.inner.delete([key])
        return presences

    def get(self, key: StoredKey, buffers: Sequence[memoryview]) -> Got | Miss:
        fault = self._draw("get", key, self._begin("get"))
        self._wait(fault)
        match fault.kind if fault else None:
            case FaultKind.FAIL:
                return Miss(MissCause.UNAVAILABLE, "a fault on purpose")
            case FaultKind.TRUNCATE:
                return Miss(MissCause.SHORT, "a fault on purpose")
            case FaultKind.VANISH:
                self.inner.delete([key])
            case FaultKind.SWAP:
                other = self._other(key, sum(buffer.nbytes for buffer in buffers))
                return self.inner.get(key if other is None else other, buffers)
            case FaultKind.FLIP:
                got = self.inner.get(key, buffers)
                self._flip(key, buffers)
                return got
        return self.inner.get(key, buffers)

    def put(
        self, key: StoredKey, parts: Iterable[memoryview], num_bytes: int, labels: bytes = b""
    ) -> PutOutcome:
        fault = self._draw("put", key, self._begin("put"))
        self._wait(fault)
        match fault.kind if fault else None:
            case FaultKind.FAIL:
                return PutOutcome.FAILED
            case FaultKind.TRUNCATE if num_bytes:
                parts = _without_last_byte(parts, num_bytes)
                return self.inner.put(key, parts, num_bytes - 1, labels)
            case FaultKind.FLIP:
                parts = self._flipped(key, parts)
            case FaultKind.SWAP:
                parts = self._swapped(key, parts, num_bytes)
        outcome = self.inner.put(key, parts, num_bytes, labels)
        with self._lock:
            self._key_to_bytes[key] = num_bytes
        if fault is not None and fault.kind == FaultKind.VANISH:
            self.inner.delete([key])
        return outcome

    def delete(self, keys: Sequence[StoredKey]) -> int:
        call = self._begin("delete")
        fault = next(filter(None, (self._draw("delete", key, call) for key in keys)), None)
        self._wait(fault)
        if fault is not None and fault.kind == FaultKind.FAIL:
            with self._lock:
                self._num_unreached += 1
            return 0
        return self.inner.delete(keys)

    @property
    def num_unreached(self) -> int:
        return self.inner.num_unreached + self._num_unreached

    def relabel(self, key: StoredKey, labels: bytes) -> bool:
        fault = self._draw("relabel", key, self._begin("relabel"))
        self._wait(fault)
        if fault is not None and fault.kind == FaultKind.FAIL:
            return False
        return self.inner.relabel(key, labels)

    def close(self) -> None:
        self.release()
        super().close()

    def _begin(self, operation: str) -> int:
        with self._lock:
            call = self._num_calls[operation]
            self._num_calls[operation] += 1
        return call

    def _draw(self, operation: str, key: StoredKey, call: int) -> Fault | None:
        """The fault that happens to a key in a call, if any."""
        with self._lock:
            num_asked = self._num_asked[operation, key]
            self._num_asked[operation, key] += 1
            for at, fault in enumerate(self._faults):
                if fault.operation != operation:
                    continue
                chance = self._random(f"{at} {operation} {num_asked}", key) / 2**64
                if call in fault.calls or chance < fault.probability:
                    self._happened[operation, str(fault.kind)] += 1
                    return fault
        return None

    def _random(self, what: str, key: StoredKey) -> int:
        """64 random bits, the same for the same arguments."""
        return xxhash.xxh3_64_intdigest(key + what.encode(), seed=self._seed)

    def _wait(self, fault: Fault | None) -> None:
        if fault is not None and fault.kind == FaultKind.DELAY:
            self._sleep(fault.delay_s)
        if fault is not None and fault.kind == FaultKind.HANG:
            with self._gate:
                self._num_hanging += 1
                self._gate.wait_for(lambda: not self._is_held)
                self._num_hanging -= 1

    def _other(self, key: StoredKey, num_bytes: int) -> StoredKey | None:
        """Another object of the same length, None where there is none."""
        with self._lock:
            others = sorted(
                other
                for other, size in self._key_to_bytes.items()
                if size == num_bytes and other != key
            )
        present = [
            other
            for other, presence in zip(others, self.inner.find(others), strict=True)
            if presence is Presence.PRESENT
        ]
        return present[self._random("swap", key) % len(present)] if present else None

    def _flip(self, key: StoredKey, buffers: Sequence[memoryview]) -> None:
        num_bits = 8 * sum(buffer.nbytes for buffer in buffers)
        at, bit = divmod(self._random("flip", key) % max(num_bits, 1), 8)
        for buffer in buffers:
            if at < buffer.nbytes:
                flat = buffer.cast("B")
                flat[at] ^= 1 << bit
                return
            at -= buffer.nbytes

    def _flipped(self, key: StoredKey, parts: Iterable[memoryview]) -> Iterator[memoryview]:
        copies = [memoryview(bytearray(part)) for part in parts]
        self._flip(key, copies)
        yield from copies

    def _swapped(
        self, key: StoredKey, parts: Iterable[memoryview], num_bytes: int
    ) -> Iterable[memoryview]:
        other = self._other(key, num_bytes)
        stolen = memoryview(bytearray(num_bytes))
        has_stolen = other is not None and isinstance(self.inner.get(other, [stolen]), Got)
        return [stolen] if has_stolen else parts


def _without_last_byte(parts: Iterable[memoryview], num_bytes: int) -> Iterator[memoryview]:
    left = num_bytes - 1
    for part in parts:
        yield part.cast("B")[:left] if part.nbytes else part
        left -= min(part.nbytes, left)


def _one_of(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        near = get_close_matches(str(value), choices, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(choices)}"
        raise ConfigError(f"{name}={value!r} is unknown here; {hint}")
    return str(value)
