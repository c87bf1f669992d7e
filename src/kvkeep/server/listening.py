"""The sockets that a server listens with, taken before anything is loaded."""

import errno
import socket
from typing import Any

from kvkeep.errors import ConfigError

__all__ = ["listening_sockets"]

_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def listening_sockets(host: str, port: int) -> list[socket.socket]:
    """One bound socket for every address of `host`, not yet listening; of port 0 all get the same free one.

    Raises ConfigError for a host that is not of this machine, and a port that is taken or not ours to take.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(
            f"host={host!r} has no address ({error.strerror or error}); give one of this machine, such as "
            "127.0.0.1 (--host)"
        ) from error
    sockets: list[socket.socket] = []
    absent: OSError | None = None
    for family, _, _, _, address in dict.fromkeys(found):
        try:
            sockets.append(_bound(family, (address[0], port, *address[2:])))
        except OSError as error:
            # A name may have addresses of protocols that this machine does not speak.
            if error.errno in _ABSENT:
                absent = error
                continue
            for one in sockets:
                one.close()
            raise _problem(host, port, error) from error
        port = sockets[-1].getsockname()[1]
    if not sockets:
        assert absent is not None, "an address is bound or fails"
        raise _problem(host, port, absent) from absent
    return sockets


def _bound(family: socket.AddressFamily, address: tuple[Any, ...]) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind(address)
    except OSError:
        one.close()
        raise
    return one


def _problem(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"port={port!r} of {host} is in use; stop what listens there, or give another one (--port, 0 for "
            "a free one)"
        )
    if error.errno in _ABSENT:
        return ConfigError(
            f"host={host!r} is no address of this machine; give one that is (--host)"
        )
    return ConfigError(
        f"port={port!r} of {host} cannot be taken ({error.strerror}); give another one (--port)"
    )
