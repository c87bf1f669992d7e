"""Our RESP tier beside a bare loop on a socket, and beside GLIDE, on a real server over loopback."""

import hashlib
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.harness import Run, Script, alternate
from kvkeep.spec import StoredKey
from kvkeep.tiers.base import Got, PutOutcome
from kvkeep.tiers.resp import RespTier
from tests.servers import RedisServer


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """`objects[i]` objects of `sizes[i]` bytes are put, and got, in a round."""

    sizes: tuple[int, ...]
    objects: tuple[int, ...]
    rounds: int
    is_unix: bool = False


class _BareLoop:
    """The least that a client can do: no deadline, no pool, no check of anything but lengths."""

    def __init__(self, server: RedisServer, *, is_unix: bool) -> None:
        if is_unix:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.connect(str(server.socket_path))
        else:
            self.sock = socket.create_connection(("127.0.0.1", server.port))
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.head = bytearray(64)

    def put(self, key: bytes, payload: memoryview) -> bool:
        head = b"*4\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, len(payload))
        pieces: list[Any] = [head, payload, b"\r\n$2\r\nNX\r\n"]
        left = sum(map(len, pieces))
        while left:
            sent = self.sock.sendmsg(pieces)
            left -= sent
            while pieces and sent >= len(pieces[0]):
                sent -= len(pieces.pop(0))
            if left:
                pieces[0] = memoryview(pieces[0])[sent:]
        return self.sock.recv(64) == b"+OK\r\n"

    def get(self, key: bytes, buffer: memoryview) -> bool:
        self.sock.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key))
        received = self.sock.recv_into(self.head)
        start = self.head.index(b"\r\n") + 2
        if int(self.head[1 : start - 2]) != len(buffer):
            return False
        done = received - start
        buffer[:done] = self.head[start:received]
        while done < len(buffer):
            done += self.sock.recv_into(buffer[done:])
        return self.sock.recv(2) == b"\r\n"

    def close(self) -> None:
        self.sock.close()


class _Ours:
    def __init__(self, url: str) -> None:
        self.tier = RespTier(url, key_prefix="", timeout_s=20.0)

    def put(self, key: bytes, payload: memoryview) -> bool:
        return self.tier.put(_stored(key), [payload], len(payload)) is PutOutcome.STORED

    def get(self, key: bytes, buffer: memoryview) -> bool:
        return self.tier.get(_stored(key), [buffer]) == Got(len(buffer))

    def close(self) -> None:
        self.tier.close()


class _Glide:
    """GLIDE called as its documentation says, without anything of ours around it."""

    def __init__(self, server: RedisServer, *, is_unix: bool) -> None:
        self.glide = import_module("glide_sync")
        place = self.glide.NodeAddress("127.0.0.1", server.port)
        if is_unix:
            place = self.glide.NodeAddress(unix_socket_path=str(server.socket_path))
        config = self.glide.GlideClientConfiguration([place], request_timeout=20_000)
        self.client = self.glide.GlideClient.create(config)
        self.if_absent = self.glide.ConditionalChange.ONLY_IF_DOES_NOT_EXIST

    def put(self, key: bytes, payload: memoryview) -> bool:
        return bool(self.client.set(key, payload, conditional_set=self.if_absent) == "OK")

    def get(self, key: bytes, buffer: memoryview) -> bool:
        return bool(self.client.get(key, buffer=buffer) == b"%d" % len(buffer))

    def close(self) -> None:
        self.client.close()


def _stored(key: bytes) -> StoredKey:
    return StoredKey(bytes.fromhex(key.decode()))


def _keys(label: object, count: int) -> list[bytes]:
    return [hashlib.sha256(f"{label}:{at}".encode()).hexdigest().encode() for at in range(count)]


def measure(run: Run, settings: Settings) -> None:
    """Each size, each way: ours and the bare loop in turn, then ours and GLIDE in turn."""
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder)) as server:
        url = f"unix://{server.socket_path}" if settings.is_unix else server.url
        bare = _BareLoop(server, is_unix=settings.is_unix)
        ours, glide = _Ours(url), _Glide(server, is_unix=settings.is_unix)
        try:
            for size, count in zip(settings.sizes, settings.objects, strict=True):
                keys = _keys(size, count)
                _check(run, (bare, ours, glide), server, keys, size)
                _compare(run, settings, server, (ours, bare, "bare loop", 0.8), count, size)
                _compare(run, settings, server, (ours, glide, "GLIDE", 1.0), count, size)
        finally:
            for side in (bare, ours, glide):
                side.close()
    run.notes += [
        "client and server share the processor; a rate is bytes of values over seconds of the whole loop",
        "every put is of a key that is not there; the database is emptied outside of what is timed",
    ]


def _check(
    run: Run,
    sides: Sequence[_BareLoop | _Ours | _Glide],
    server: RedisServer,
    keys: list[bytes],
    size: int,
) -> None:
    """Every side gets what it puts, byte for byte, and ours what others put as well.

    Others are not asked for what ours puts: it has labels behind it.
    """
    payload = hashlib.shake_128(keys[0]).digest(size)
    holds = True
    for writer in sides:
        server.run("FLUSHALL")
        holds &= writer.put(keys[0], memoryview(payload))
        for reader in (one for one in sides if one is writer or isinstance(one, _Ours)):
            buffer = bytearray(size)
            holds &= reader.get(keys[0], memoryview(buffer)) and buffer == payload
    run.check(f"every client gets what it puts, and ours what all put, {size} bytes", holds=holds)


def _compare(
    run: Run,
    settings: Settings,
    server: RedisServer,
    pair: tuple[_Ours, _BareLoop | _Glide, str, float],
    count: int,
    size: int,
) -> None:
    ours, other, name, least = pair
    payload = memoryview(hashlib.shake_128(b"payload").digest(size))
    buffer = memoryview(bytearray(size))

    def emptied(side: _Ours | _BareLoop | _Glide) -> Callable[[int], float]:
        def put(number: int) -> float:
            server.run("FLUSHALL")
            # A tier asks before it sends what it has seen there.
            fresh = _keys((size, number), count)
            start = perf_counter()
            for key in fresh:
                side.put(key, payload)
            return perf_counter() - start

        return put

    def got(side: _Ours | _BareLoop | _Glide) -> Callable[[int], None]:
        own = _keys((size, name, type(side).__name__), count)
        for key in own:
            side.put(key, payload)

        def get(_: int) -> None:
            for key in own:
                side.get(key, buffer)

        return get

    mib = size * count / 2**20
    for what, make in (("put", emptied), ("get", got)):
        paired = alternate(
            make(ours), make(other), rounds=settings.rounds, warmups=2, budget_s=run.budget_s
        )
        label = f"{what} {size >> 10} KiB"
        run.add(f"{label}: ours", [mib / s for s in paired.first_s], "MiB/s")
        run.add(f"{label}: {name}", [mib / s for s in paired.second_s], "MiB/s")
        ratios = paired.second_over_first()
        run.add(f"{label}: ours over {name}", ratios, "x", at_least=None if run.is_quick else least)


main = Script(
    name="resp_speed",
    claim="The RESP tier reaches 80 % of a bare socket loop's speed, and at least that of GLIDE.",
    full=Settings(sizes=(1 << 16, 1 << 20, 1 << 22), objects=(400, 48, 12), rounds=30),
    quick=Settings(sizes=(1 << 14,), objects=(5,), rounds=3),
    measure=measure,
    uses_torch=False,
)

if __name__ == "__main__":
    main()
