import pytest

from kvkeep.errors import ConfigError
from kvkeep.tiers.resp_stream import TcpAddress, UnixAddress
from kvkeep.tiers.resp_url import RESP_SCHEMES, TlsFiles, hide_password, parse_resp_url


def test_all_parts_of_an_address() -> None:
    """Login, host, port, database and options."""
    url = parse_resp_url("valkey://me:s%40crat@store.example:7000/3?protocol=2&client_name=box-7")

    assert url.addresses == (TcpAddress("store.example", 7000),)
    assert (url.user, url.password, url.database) == ("me", "s@crat", 3)
    assert (url.protocol, url.client_name, url.client) == (2, "box-7", "sockets")
    assert url.tls is None
    assert not url.is_cluster


def test_what_is_left_out_is_the_usual() -> None:
    """Port 6379, database 0, nobody's name and no password."""
    url = parse_resp_url("redis://localhost")

    assert url.addresses == (TcpAddress("localhost", 6379),)
    assert (url.user, url.password, url.database, url.protocol) == (None, None, 0, 3)


@pytest.mark.parametrize("host", ["[::1]:7000", "[::1]"])
def test_addresses_of_version_6_stand_in_brackets(host: str) -> None:
    """The brackets are no part of the address."""
    (address,) = parse_resp_url(f"redis://:pw@{host}/1").addresses

    assert isinstance(address, TcpAddress)
    assert address.host == "::1"
    assert str(address).startswith("[::1]:")


def test_a_unix_socket_has_a_path() -> None:
    """Its database is an option, since the path is taken."""
    url = parse_resp_url("unix://me:pw@/run/my%20redis.sock?db=2")

    assert url.addresses == (UnixAddress("/run/my redis.sock"),)
    assert (url.user, url.password, url.database) == ("me", "pw", 2)


def test_a_cluster_has_several_hosts() -> None:
    """All of them are asked who has what."""
    url = parse_resp_url("rediss+cluster://me:pw@a:7001,b,[::2]:7003")

    assert url.is_cluster
    assert url.tls == TlsFiles()
    assert url.addresses == (TcpAddress("a", 7001), TcpAddress("b", 6379), TcpAddress("::2", 7003))


def test_tls_has_files() -> None:
    """Their names are percent-encoded like all of an address."""
    url = parse_resp_url(
        "valkeys://a?ca_file=/c%26a.pem&cert_file=me.pem&key_file=me.key&verify=no"
    )

    assert url.tls == TlsFiles(
        ca_file="/c&a.pem", cert_file="me.pem", key_file="me.key", verifies=False
    )


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redsi://a", "did you mean redis"),
        ("http://a", "choose from"),
        ("localhost:6379", "scheme"),
        ("redis://", "no host"),
        ("redis://a:0", "port 0"),
        ("redis://a:66000", "port 66000"),
        ("redis://a:x", "no host"),
        ("redis://a/b", "'b' is no number"),
        ("redis://a/1?db=2", "twice"),
        ("redis://a?db=1&db=2", "twice"),
        ("redis://a,b", r"redis\+cluster"),
        ("redis+cluster://a,b/1", "database 0 only"),
        ("redis://a?ca_file=x", "without TLS"),
        ("rediss://a?cafile=x", "did you mean ca_file"),
        ("rediss://a?verify=maybe", "choose from yes, no"),
        ("rediss://a?key_file=x", "without cert_file"),
        ("redis://a?protocol=4", "choose from 2, 3"),
        ("redis://a?client=redis-py", "choose from sockets, glide"),
        ("redis://a?client_name=a%20b", "without spaces"),
        ("redis://me@a", "without a password"),
        ("unix://", "path of the socket"),
        ("unix://host/a.sock", "path of the socket"),
        ("redis://[::1", "redis://"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(url: str, message: str) -> None:
    """The message names the url, the fault and what to write instead."""
    with pytest.raises(ConfigError, match="(?s)url=.*" + message):
        parse_resp_url(url)


@pytest.mark.parametrize("scheme", RESP_SCHEMES)
def test_passwords_are_never_shown(scheme: str) -> None:
    """Neither in text, nor in representations, nor in errors, be they about something else."""
    place = "/run/a.sock" if scheme == "unix" else "a:7000"
    url = f"{scheme}://me:topsecret@{place}"

    with pytest.raises(ConfigError) as caught:
        parse_resp_url(f"{url}?nonsense=1")

    parsed = parse_resp_url(url)
    assert parsed.password == "topsecret"  # noqa: S105  it is the test's
    for text in (str(parsed), repr(parsed), str(caught.value), hide_password(url)):
        assert "topsecret" not in text
        assert "me:***@" in text
