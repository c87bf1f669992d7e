"""A real server for the tests of a module."""

from collections.abc import Iterator

import pytest

from tests.running_server import RunningServer, running_server


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """The bundled model on a free loopback port, without keys: `server.url`, `server.client()`."""
    with running_server() as running:
        yield running
