"""`kvkeep serve` as a process: it says where it is, stops in order, and keeps the cache."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any

import httpx
import pytest

from tests.servers import wait_until

_KEY = "a-key-for-the-tests"
_PROMPT = "The secret word is xylophone. " * 20
_ADDRESS = re.compile(r"serves \S+ at (http://[0-9.:]+)")


@dataclass
class Served:
    """A process, and where it listens."""

    process: "subprocess.Popen[bytes]"
    log: Path
    url: str = ""

    def client(self, key: str | None = None) -> httpx.Client:
        """A client with the key, if there is one."""
        headers = {} if key is None else {"x-api-key": key}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(30)


@contextmanager
def serve(
    folder: Path, *arguments: str, environment: dict[str, str] | None = None
) -> Iterator[Served]:
    """The program on a free port, with its log in `folder`; ready, and killed at the end."""
    log = folder / "serve.log"
    command = [sys.executable, "-m", "kvkeep.cli.main", "serve", "--port", "0", *arguments]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=env)
    served = Served(process, log)
    try:
        wait_until(
            lambda: _ADDRESS.search(log.read_text()) or process.poll() is not None,
            "it says where it listens",
            timeout_s=60,
        )
        found = _ADDRESS.search(log.read_text())
        assert found, log.read_text()
        served.url = found[1]
        wait_until(
            lambda: httpx.get(f"{served.url}/health").status_code == 200, "ready", timeout_s=60
        )
        yield served
    finally:
        process.kill()
        process.wait()


def completion(client: httpx.Client, **body: Any) -> dict[str, Any]:
    """One answered request."""
    asked = {"prompt": _PROMPT, "max_tokens": 4, "temperature": 0, **body}
    response = client.post("/v1/completions", json=asked)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def fails(*arguments: str, environment: dict[str, str] | None = None) -> Sequence[object]:
    """Exit code and the last line of a program that does not come to serve."""
    command = [sys.executable, "-m", "kvkeep.cli.main", "serve", "--port", "0", *arguments]
    env = {**os.environ, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)
    return done.returncode, done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_finish(tmp_path: Path, number: signal.Signals) -> None:
    """The stream that runs gets its last token, new connections are refused, the exit code is 0."""
    body = {"prompt": _PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with serve(tmp_path) as served, served.client() as client:
        with client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            served.process.send_signal(number)
            rest = [line for line in lines if line]
        assert served.process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{served.url}/health")

    assert rest[-1] == "data: [DONE]"
    reasons = [json.loads(line[6:])["choices"] for line in rest[:-1]]
    assert [one[0]["finish_reason"] for one in reasons if one][-1] == "length"


def test_requests_that_take_too_long_are_ended_when_it_stops(tmp_path: Path) -> None:
    """`--drain` is the most that a stop takes. Clients are told: as an event, or by the status 503."""
    body = {"prompt": _PROMPT, "max_tokens": 8000, "ignore_eos": True}
    with (
        ThreadPoolExecutor(1) as pool,
        serve(tmp_path, "--drain", "1s", "--status", "100ms", "--tier", "host:16MB") as served,
        served.client() as client,
        served.client() as other,
        client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        whole = pool.submit(other.post, "/v1/completions", json=body)
        wait_until(lambda: "running 2" in served.log.read_text(), "both run")
        assert served.stop() == 0
        rest = [line for line in lines if line]
        log = served.log.read_text()

    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "unavailable"
    assert whole.result().status_code == 503
    assert "stopping: 2 requests have up to 1 s" in log
    assert log.rstrip().endswith("stopped")
    assert "Traceback" not in log


def test_the_cache_and_its_tenants_outlive_a_restart(tmp_path: Path) -> None:
    """Blocks of a key are found again on disk, by that key alone."""
    arguments = ("--tier", f"disk:{tmp_path}/blocks:100MB?write_on=finished,closing")
    environment = {"KVKEEP_API_KEYS": f"{_KEY} another-key-for-them"}
    with serve(tmp_path, *arguments, environment=environment) as served:
        with served.client(_KEY) as client:
            completion(client)
        assert httpx.get(f"{served.url}/v1/models").status_code == 401
        assert served.stop() == 0
    with serve(tmp_path, *arguments, environment=environment) as served:
        with served.client("another-key-for-them") as client:
            others = completion(client)
        with served.client(_KEY) as client:
            again = completion(client)
        assert served.stop() == 0

    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
    assert others["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_the_log_has_a_line_for_every_request_and_no_prompt(tmp_path: Path) -> None:
    """Ids, tokens, what was cached, milliseconds; as JSON for programs."""
    with serve(tmp_path, "--log-format", "json", "--status", "200ms") as served:
        with served.client() as client:
            completion(client)
            completion(client)
            client.post("/v1/completions", json={"prompt": "xylophone", "model": "xylophone?"})
            wait_until(lambda: "running 0" in served.log.read_text(), "a line about the state")
        served.stop()
        log = served.log.read_text()

    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    jobs = [line for line in lines if line["logger"] == "kvkeep.server.jobs"]
    assert len(jobs) == 2
    assert jobs[1]["cached_tokens"] > 100
    assert jobs[1]["output_tokens"] == 4
    assert jobs[1]["finish"] == "length"
    assert jobs[1]["total_ms"] > 0
    assert any(" · 404 · " in str(line.get("message")) for line in lines)
    assert "xylophone" not in log


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "message"),
    [
        (["--host", "0.0.0.0"], {}, 2, "api_keys is empty"),  # noqa: S104  which is refused
        (["--api-key", "short"], {}, 2, "characters"),
        (["--max-body", "lots"], {}, 2, "max_body_bytes='lots'"),
        (["--drain", "never"], {}, 2, "drain_s"),
        (["--tier", "disk"], {}, 2, "disk"),
        ([], {"KVKEEP_DRAIN_S": "never"}, 2, "drain_s='never' has no end"),
        ([], {"KVKEEP_LOG_FORMAT": "xml"}, 2, "(from KVKEEP_LOG_FORMAT)"),
        (["no/such/model/here"], {}, 2, "no/such/model/here"),
        ([], {"KVKEEP_API_KEYS": "short"}, 2, "characters"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    arguments: list[str], environment: dict[str, str], code: int, message: str
) -> None:
    """A wrong option, or a model that cannot be loaded, ends the program with the reason."""
    found, line = fails(*arguments, environment=environment)

    assert found == code, line
    assert message in str(line)


def test_a_settings_file_has_all_there_is_to_say(tmp_path: Path) -> None:
    """Keys, limits, tiers, and prompts that are computed at the start; flags overrule it."""
    (tmp_path / "prompt.txt").write_text(_PROMPT)
    file = tmp_path / "kvkeep.toml"
    file.write_text(
        f"""
        [server]
        api_keys = ["{_KEY}"]
        max_body_bytes = "1KB"
        request_timeout_s = "1m"
        [[tiers]]
        kind = "disk"
        folder = "{tmp_path}/blocks"
        capacity = "100MB"
        [[warm]]
        file = "prompt.txt"
        ttl = "1h"
        """
    )
    with serve(tmp_path, "--config", str(file), "--max-body", "2KB") as served:
        assert httpx.get(f"{served.url}/v1/models").status_code == 401
        wait_until(lambda: "1 of 1 warm" in served.log.read_text(), "it is computed")
        with served.client(_KEY) as client:
            found = completion(client)
            assert client.post("/tokenize", json={"prompt": "a" * 1500}).status_code == 200
            assert client.post("/tokenize", json={"prompt": "a" * 2500}).status_code == 413
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] > 100


def test_contexts_that_were_answered_outlive_kill_9(tmp_path: Path) -> None:
    """Killed at any time, the next process lists every context that a client was told of."""
    arguments = ("--tier", f"disk:{tmp_path}/blocks:100MB")
    told: list[str] = []
    for number in range(3):
        with serve(tmp_path, *arguments) as served, served.client() as client:
            listed = client.get("/v1/cache/contexts").json()["data"]
            assert {one["name"] for one in listed} >= set(told)
            Timer(0.3 + 0.2 * number, served.process.kill).start()
            with suppress(httpx.TransportError):
                for at in range(10_000):
                    body = {"name": f"{number}-{at}", "prompt": f"{number} {at} {_PROMPT}"}
                    assert client.post("/v1/cache/contexts", json=body).status_code == 201
                    told.append(f"{number}-{at}")
    assert len(told) > 3


def test_keys_can_come_from_a_file(tmp_path: Path) -> None:
    """One on each line, with remarks."""
    keys = tmp_path / "keys"
    keys.write_text(f"# ours\n{_KEY}  # of the tests\n\n")
    with serve(tmp_path, "--api-keys-file", str(keys)) as served:
        assert httpx.get(f"{served.url}/version").status_code == 401
        with served.client(_KEY) as client:
            assert client.get("/version").status_code == 200
