"""Addresses of RESP servers as people write them.

    redis://user:password@host:6379/0              valkey:// is the same
    rediss://host:6379?ca_file=/etc/ssl/own.pem    TLS; valkeys:// is the same
    unix:///run/redis.sock?db=1                    unix://user:password@/run/redis.sock
    redis+cluster://host:7001,host:7002            also rediss+, valkey+ and valkeys+cluster

User and password are percent-encoded where they contain one of ``:/@?#%``.
"""

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

from kvkeep.config.nearest import nearest_hint
from kvkeep.errors import ConfigError
from kvkeep.tiers.resp_stream import Address, TcpAddress, UnixAddress

__all__ = [
    "RESP_SCHEMES",
    "RESP_URL_OPTIONS",
    "RespUrl",
    "TlsFiles",
    "hide_password",
    "parse_resp_url",
]

_PLAIN_SCHEMES = ("redis", "valkey")
_TLS_SCHEMES = ("rediss", "valkeys")
_CLUSTER = "+cluster"
RESP_SCHEMES = (
    *_PLAIN_SCHEMES, *_TLS_SCHEMES, "unix",
    *(scheme + _CLUSTER for scheme in (*_PLAIN_SCHEMES, *_TLS_SCHEMES)),
)  # fmt: skip
_TLS_OPTIONS = ("ca_file", "cert_file", "key_file", "verify")
# What may follow "?" in an address.
RESP_URL_OPTIONS = ("db", "protocol", "client_name", "client", *_TLS_OPTIONS)
_CHOICES = {"verify": ("yes", "no"), "protocol": ("2", "3"), "client": ("sockets", "glide")}
_DEFAULT_PORT = 6379


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsFiles:
    """What TLS needs beside the system's own authorities; `cert_file` is ours, for servers that ask."""

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    verifies: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class RespUrl:
    """An address taken apart; as text it is without the password."""

    shown: str
    addresses: tuple[Address, ...]
    is_cluster: bool
    user: str | None
    password: str | None = field(repr=False)
    database: int
    tls: TlsFiles | None
    protocol: int
    client_name: str
    client: str

    def __str__(self) -> str:
        return self.shown


def hide_password(url: str) -> str:
    """The address with stars for its password.

    >>> hide_password("redis://me:secret@host/0"), hide_password("redis://host")
    ('redis://me:***@host/0', 'redis://host')
    """
    return re.sub(r"(://[^:/?#@]*):.*@", r"\1:***@", url)


def parse_resp_url(url: str) -> RespUrl:
    """The parts of an address; raises ConfigError, without the password in it, where one cannot be."""
    shown = hide_password(url)
    scheme, colon, rest = url.partition("://")
    if not colon or scheme not in RESP_SCHEMES:
        raise _wrong(shown, f"the scheme is {scheme!r}", nearest_hint(scheme, RESP_SCHEMES))
    try:
        parts = urlsplit(f"//{rest}")
    except ValueError as error:
        raise _wrong(shown, str(error), "write redis://host:port/0") from error
    options = _options(shown, parts.query)
    login, _, places = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    if user and not password:
        raise _wrong(shown, "a user without a password", "write user:password@, or :password@")
    is_cluster = scheme.endswith(_CLUSTER)
    if scheme == "unix":
        addresses: tuple[Address, ...] = (_unix_address(shown, places, parts.path),)
    else:
        addresses = _tcp_addresses(shown, places, is_cluster=is_cluster)
    has_tls = scheme.removesuffix(_CLUSTER) in _TLS_SCHEMES
    return RespUrl(
        shown=shown,
        addresses=addresses,
        is_cluster=is_cluster,
        user=unquote(user) or None,
        password=unquote(password) or None,
        database=_database(
            shown, "" if scheme == "unix" else parts.path, options, is_cluster=is_cluster
        ),
        tls=_tls_files(shown, options, has_tls=has_tls),
        protocol=int(options.get("protocol", "3")),
        client_name=_client_name(shown, options),
        client=options.get("client", "sockets"),
    )


def _wrong(shown: str, problem: str, remedy: str) -> ConfigError:
    return ConfigError(f"url={shown!r}: {problem}; {remedy}")


def _options(shown: str, query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in RESP_URL_OPTIONS:
            raise _wrong(shown, f"{name} is no option", nearest_hint(name, RESP_URL_OPTIONS))
        if name in options:
            raise _wrong(shown, f"{name} is there twice", "give it once")
        choices = _CHOICES.get(name)
        if choices and value not in choices:
            raise _wrong(shown, f"{name}={value}", f"choose from {', '.join(choices)}")
        options[name] = value
    return options


def _unix_address(shown: str, host: str, path: str) -> UnixAddress:
    if host or len(path) < 2:
        raise _wrong(shown, "the path of the socket is missing", "write unix:///path/to.sock")
    return UnixAddress(unquote(path))


def _tcp_addresses(shown: str, places: str, *, is_cluster: bool) -> tuple[Address, ...]:
    names = places.split(",")
    if len(names) > 1 and not is_cluster:
        raise _wrong(shown, "several hosts", "write redis+cluster:// for a cluster")
    return tuple(_tcp_address(shown, name) for name in names)


def _tcp_address(shown: str, place: str) -> TcpAddress:
    match = re.fullmatch(r"(?:\[(?P<v6>[^\]]+)\]|(?P<name>[^:\[\]]+))(?::(?P<port>\d+))?", place)
    if match is None:
        raise _wrong(shown, f"{place!r} is no host", "write host:port, with [ ] around IPv6")
    port = int(match["port"] or _DEFAULT_PORT)
    if not 0 < port < 1 << 16:
        raise _wrong(shown, f"port {port}", "give one from 1 to 65535")
    return TcpAddress(match["v6"] or unquote(match["name"]), port)


def _database(shown: str, path: str, options: dict[str, str], *, is_cluster: bool) -> int:
    digits = path.strip("/")
    if digits and "db" in options:
        raise _wrong(shown, "the database is there twice", "give it once")
    digits = digits or options.get("db", "0")
    if not digits.isdecimal() or len(digits) > 9:
        raise _wrong(shown, f"database {digits!r} is no number", "write /0, or leave it out")
    if is_cluster and int(digits):
        raise _wrong(shown, f"database {digits}", "clusters have database 0 only")
    return int(digits)


def _client_name(shown: str, options: dict[str, str]) -> str:
    name = options.get("client_name", "kvkeep")
    if not re.fullmatch(r"[!-~]{1,100}", name):
        raise _wrong(shown, f"client_name={name!r}", "give up to 100 letters without spaces")
    return name


def _tls_files(shown: str, options: dict[str, str], *, has_tls: bool) -> TlsFiles | None:
    given = [name for name in _TLS_OPTIONS if name in options]
    if not has_tls:
        if given:
            raise _wrong(shown, f"{given[0]} without TLS", "write rediss:// or valkeys://")
        return None
    if "key_file" in given and "cert_file" not in given:
        raise _wrong(shown, "key_file without cert_file", "give both, or cert_file with both in it")
    return TlsFiles(
        ca_file=options.get("ca_file"),
        cert_file=options.get("cert_file"),
        key_file=options.get("key_file"),
        verifies=options.get("verify", "yes") == "yes",
    )
