"""Who may not use a server, and what is no server, is told so; what changes later costs misses only."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkeep.errors import ConfigError
from kvkeep.testing.tier_contents import key_of, read_object, store_object
from kvkeep.tiers.base import MissCause, PutOutcome
from kvkeep.tiers.resp import RespTier
from tests.proxies import store_proxy
from tests.remote_tiers import cause_of, works_again
from tests.servers import RedisServer, make_certificates, wait_until

_TIMEOUT_S = 0.6
_PATIENT_S = 20.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of its own, which the test may ill-treat."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


def test_a_wrong_password_is_a_setting(tmp_path: Path) -> None:
    """None, a wrong one, and a user that is not there; the message tells no password."""
    with RedisServer(tmp_path, password="rightone") as server:  # noqa: S106  of this test
        place = f"127.0.0.1:{server.port}"
        for login, protocol in (("", 3), (":wrongone@", 3), (":wrongone@", 2), ("me:wrongone@", 3)):
            with pytest.raises(ConfigError, match="check user and password") as caught:
                RespTier(f"redis://{login}{place}?protocol={protocol}", timeout_s=_PATIENT_S)
            assert "wrongone" not in str(caught.value)
        with pytest.raises(ConfigError, match="database 99 is refused"):
            RespTier(f"{server.url}/99", timeout_s=_PATIENT_S)

        for protocol in (2, 3):
            with RespTier(f"{server.url}?protocol={protocol}", timeout_s=_PATIENT_S) as tier:
                assert works_again(tier)


def test_a_password_that_changes_is_unavailable_until_it_is_right_again(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """What was right at the start is no error later, and the warning says what to check."""
    with RespTier(server.url, timeout_s=_PATIENT_S) as tier:
        assert works_again(tier)
        server.run("CONFIG", "SET", "requirepass", "new")
        server.run("CLIENT", "KILL", "TYPE", "normal", password="new")  # noqa: S106  of this test

        for _ in range(4):
            assert cause_of(read_object(tier, key_of(1), 1000)) is MissCause.UNAVAILABLE
        assert "check user and password" in caplog.text
        server.run("CONFIG", "SET", "requirepass", "", password="new")  # noqa: S106  of this test
        wait_until(lambda: works_again(tier), "an answer")


def test_a_certificate_of_somebody_else_is_a_setting(tmp_path: Path) -> None:
    """Unless one asks for no check; plain bytes to a TLS port are merely unavailable."""
    files, others = make_certificates(tmp_path / "ours"), make_certificates(tmp_path / "others")
    with RedisServer(tmp_path / "redis", tls=files) as server:
        place = f"127.0.0.1:{server.port}"
        for query in (f"?ca_file={others.ca_file}", ""):
            with pytest.raises(ConfigError, match=r"certificate is refused.*ca_file"):
                RespTier(f"rediss://{place}{query}", timeout_s=_PATIENT_S)
        with pytest.raises(ConfigError, match="ca_file="):
            RespTier(f"rediss://{place}?ca_file={tmp_path}/none", timeout_s=_PATIENT_S)
        with RespTier(f"rediss://{place}?verify=no", timeout_s=_PATIENT_S) as tier:
            assert works_again(tier)
        with RespTier(f"redis://{place}", timeout_s=_PATIENT_S) as tier:
            assert cause_of(read_object(tier, key_of(1), 10)) is MissCause.UNAVAILABLE


def test_what_is_no_redis_is_unavailable() -> None:
    """A web server answers, and says nothing that can be used."""
    with (
        store_proxy(1) as web,
        RespTier(f"redis://127.0.0.1:{web.server_port}", timeout_s=_TIMEOUT_S) as tier,
    ):
        assert cause_of(read_object(tier, key_of(1), 10)) is MissCause.UNAVAILABLE
        assert store_object(tier, key_of(1), 10) is PutOutcome.FAILED
