"""A RESP server that is a dict."""

from collections.abc import Callable, Iterator, Sequence

from kvkeep.tiers.base import Got, Miss, MissCause, PutOutcome
from kvkeep.tiers.breaker import Breaker
from kvkeep.tiers.deadlines import CallError, Deadline
from kvkeep.tiers.resp_transport import Deleted, Named, Patch, SetRequest, SetResult
from kvkeep.tiers.stored_value import End, is_tail, judge
from kvkeep.tiers.views import scatter

__all__ = ["DictTransport"]


class DictTransport:
    """The seam, filled by a dict: what a tier does is seen in `calls`."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.calls: list[str] = []
        self.breakers: Sequence[Breaker] = [Breaker("dict")]
        self.ping_fault: CallError | None = None
        self.set_result: SetResult | None = None
        self.last_set: SetRequest | None = None
        self.foreign: list[bytes] = []
        self.before_patch: Callable[[], object] | None = None

    def exists_many(self, keys: Sequence[bytes], deadline: Deadline) -> list[bool]:
        self.calls.append(f"exists {len(keys)}")
        return [key in self.values for key in keys]

    def get_into(
        self, key: bytes, views: Sequence[memoryview], num_bytes: int, deadline: Deadline
    ) -> Got | Miss:
        self.calls.append("get")
        value = self.values.get(key)
        if value is None:
            return Miss(MissCause.ABSENT)
        if not is_tail(len(value) - num_bytes):
            return Miss(MissCause.SHORT)
        scatter(memoryview(value)[:num_bytes], views)
        return judge(views, value[num_bytes:], num_bytes)

    def set(self, request: SetRequest, deadline: Deadline) -> SetResult:
        self.calls.append("set")
        self.last_set = request
        if self.set_result is not None:
            return self.set_result
        value = b"".join([*request.parts, request.tail])
        if request.key in self.values:
            return SetResult(PutOutcome.PRESENT)
        self.values[request.key] = value
        return SetResult(PutOutcome.STORED)

    def ends(self, keys: Sequence[bytes], num_bytes: int, deadline: Deadline) -> list[End | None]:
        self.calls.append(f"ends {len(keys)}")
        values = [self.values.get(key) for key in keys]
        return [None if value is None else End(len(value), value[-num_bytes:]) for value in values]

    def patch_many(self, patches: Sequence[Patch], deadline: Deadline) -> list[SetResult]:
        self.calls.append(f"patch {len(patches)}")
        if self.before_patch is not None:
            self.before_patch()
        return [self._patch(patch) for patch in patches]

    def _patch(self, patch: Patch) -> SetResult:
        value = self.values.get(patch.key, b"")
        if len(value) != patch.length or not value.endswith(patch.end):
            return SetResult(PutOutcome.REFUSED)
        end = patch.offset + len(patch.content)
        self.values[patch.key] = value[: patch.offset] + patch.content + value[end:]
        return SetResult(PutOutcome.STORED)

    def delete_many(self, keys: Sequence[bytes], deadline: Deadline) -> Deleted:
        self.calls.append(f"delete {len(keys)}")
        values = [self.values.pop(key) for key in keys if key in self.values]
        return Deleted(len(values), sum(map(len, values)))

    def touch_many(self, keys: Sequence[bytes], ttl_ms: int | None, deadline: Deadline) -> None:
        self.calls.append(f"touch {len(keys)} {ttl_ms}")

    def scan(self, prefix: bytes, timeout_s: float, *, end_bytes: int) -> Iterator[Named]:
        for name in [*self.values, *self.values, *self.foreign]:
            if name.startswith(prefix):
                value = self.values.get(name, b"")
                yield Named(name, End(len(value), value[-end_bytes:]))
        if self.ping_fault is not None:
            raise self.ping_fault

    def ping(self, deadline: Deadline) -> None:
        if self.ping_fault is not None:
            raise self.ping_fault

    def close(self) -> None:
        self.calls.append("close")
