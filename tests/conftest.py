"""What every test shares: no network, fixed seeds, Hypothesis profiles."""

import os

# Before anything imports transformers or tokenizers, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tiny models have nothing to share among threads, and two test processes share the cores. An idle
# OpenMP thread that spins for its next turn costs more than a test.
os.environ["OMP_NUM_THREADS"] = "1"

import ipaddress
import logging
import random
import socket
import sys

import hypothesis
import numpy as np
import pytest

from tests.machine_limits import num_usable_cores

# Each loads torch and models of its own.
_WORKER_BYTES = 2 * 2**30

hypothesis.settings.register_profile("dev", deadline=None, max_examples=50)
hypothesis.settings.register_profile(
    "ci",
    deadline=None,
    max_examples=100,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("KVKEEP_TEST_PROFILE", "dev"))

_connect = socket.socket.connect
_connect_ex = socket.socket.connect_ex


def _is_local(host: str) -> bool:
    """Whether an address is this machine's own; names other than localhost are not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _refuse_remote(sock: socket.socket, address: object) -> None:
    """Fail the test that opens a connection to another machine."""
    is_internet = sock.family in {socket.AF_INET, socket.AF_INET6}
    if is_internet and isinstance(address, tuple) and not _is_local(str(address[0])):
        # Not an OSError: code under test would take that for an unreachable store and go on.
        sock.close()
        raise RuntimeError(f"a test tried to reach {address}; tests use loopback addresses only")


@pytest.fixture(autouse=True)
def _loggers_speak() -> None:
    """Undo what a library that configures logging in this process has done to our loggers."""
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("kvkeep") and isinstance(logger, logging.Logger):
            logger.disabled = False


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sockets connect to loopback addresses and Unix sockets only."""

    def connect(sock: socket.socket, address: tuple[str, int]) -> None:
        _refuse_remote(sock, address)
        _connect(sock, address)

    def connect_ex(sock: socket.socket, address: tuple[str, int]) -> int:
        _refuse_remote(sock, address)
        return _connect_ex(sock, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "connect_ex", connect_ex)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """Start every test from the same random state; torch only where a test has loaded it."""
    random.seed(0)
    np.random.seed(0)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)


def pytest_xdist_auto_num_workers() -> int:
    """A worker for each core, as far as there is memory for them."""
    from kvkeep.tiers.settings import machine_memory_bytes

    return max(1, min(num_usable_cores(), machine_memory_bytes() // _WORKER_BYTES))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
