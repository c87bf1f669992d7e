"""Contexts that outlive the server, and prompts of the settings that are computed when it starts."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvkeep.config.warm import WarmPrompt
from kvkeep.tiers import Disk
from tests.running_server import RunningServer, running_server
from tests.servers import wait_until

LAW = "The tenant shall keep the garden, the roof and the lighthouse in good order. " * 6
KEYS = ("key-of-anna-1", "key-of-bert-1")
_DONE = "warm contexts are there"


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[RunningServer]:
    """A server whose cache and names of contexts lie in a folder."""
    disk = Disk(folder / "blocks", "100MB", write_on=("finished", "closing"))
    with running_server(
        tiers=[disk],
        contexts_file=folder / "contexts",
        secret_file=folder / "secret",
        llm_options={"calibration_folder": None},
        **settings,
    ) as running:
        yield running


def contexts(client: httpx.Client) -> list[dict[str, Any]]:
    """What the server lists."""
    answer = client.get("/v1/cache/contexts")
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


def cached_tokens(client: httpx.Client, prompt: str) -> int:
    """How much of a prompt a request finds."""
    body = {"prompt": prompt, "max_tokens": 1}
    usage = client.post("/v1/completions", json=body).json()["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def warmed(caplog: pytest.LogCaptureFixture) -> Sequence[str]:
    """Lines of the log about what was computed at the start, when all of it is."""
    wait_until(lambda: _DONE in caplog.text, "all is computed")
    return [one.getMessage() for one in caplog.records if one.name == "kvkeep.server.warming"]


def test_contexts_are_there_after_a_restart(tmp_path: Path) -> None:
    """With what is known of each, their tags, times and pins; and they can be renewed and deleted."""
    with serving(tmp_path) as server, server.client() as client:
        for name in ("law", "rules"):
            body = {"name": name, "prompt": name + LAW, "ttl": "7d", "tags": ["t"]}
            client.post("/v1/cache/contexts", json=body).raise_for_status()
        client.patch("/v1/cache/contexts/law", json={"pinned": True}).raise_for_status()
        client.post("/v1/cache/contexts", json={"name": "gone", "prompt": "x" + LAW})
        client.delete("/v1/cache/contexts/gone").raise_for_status()
        before = contexts(client)

    with serving(tmp_path) as server, server.client() as client:
        after = contexts(client)
        assert after == before
        assert [one["name"] for one in after] == ["law", "rules"]
        assert after[0]["pinned"] is True
        assert all(one["known_tokens"] >= one["tokens"] // 32 * 32 > 100 for one in after)
        client.post("/v1/cache/purge", json={"tags": ["t"], "include_pinned": True})
        assert [one["known_tokens"] // 32 for one in contexts(client)] == [0, 0]
        renewed = client.patch("/v1/cache/contexts/rules", json={"ttl": "1h"}).json()
        assert renewed["known_tokens"] >= renewed["tokens"] // 32 * 32
        assert cached_tokens(client, "rules" + LAW) > 100
        client.delete("/v1/cache/contexts/rules").raise_for_status()
        # Its pin went with the purge.
        client.delete("/v1/cache/contexts/law").raise_for_status()
        assert contexts(client) == []


def test_names_of_tenants_stay_apart_after_a_restart(tmp_path: Path) -> None:
    """Each finds its own."""
    for is_first in (True, False):
        with serving(tmp_path, api_keys=KEYS) as server:
            for key in KEYS:
                with server.client(key) as client:
                    if is_first:
                        body = {"name": "law", "prompt": key + LAW}
                        client.post("/v1/cache/contexts", json=body).raise_for_status()
                    assert [one["name"] for one in contexts(client)] == ["law"]
                    assert contexts(client)[0]["known_tokens"] > 100


def test_prompts_of_the_settings_are_computed_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With progress in the log; requests find them, and after a restart there is nothing to compute."""
    caplog.set_level(logging.INFO)
    messages = [{"role": "system", "content": LAW}]
    warm = (
        WarmPrompt(name="law", fields={"prompt": LAW, "ttl": "1h", "tags": ["t"]}, place="here"),
        WarmPrompt(name="chat", fields={"messages": messages, "pin": True}, place="there"),
    )
    with serving(tmp_path, warm=warm) as server, server.client() as client:
        lines = warmed(caplog)
        assert lines[0].startswith("warm 1 of 2: law: ")
        assert lines[1].startswith("warm 2 of 2: chat: ")
        assert lines[2] == f"2 of 2 {_DONE}"
        assert cached_tokens(client, LAW + "Who pays?") > 100
        assert [one["pinned"] for one in contexts(client)] == [True, False]

    caplog.clear()
    with serving(tmp_path, warm=warm):
        lines = warmed(caplog)
    computed = [int(line.split(": ")[2].split()[0]) for line in lines[:2]]
    assert max(computed) <= 32


def test_what_cannot_be_computed_is_logged_with_its_field(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The others are, and the server serves."""
    caplog.set_level(logging.INFO)
    bad: list[dict[str, object]] = [
        {"prompt": LAW, "ttl": "soon"},
        {"prompt": LAW, "tags": "t"},
        {"token_ids": [2**31]},
        {"prompt": LAW * 1000},
        {"prompt": LAW, "token_ids": [1]},
        {"prompt": LAW * 5, "pin": True},
    ]
    warm = [WarmPrompt(name=f"bad-{at}", fields=one, place="x") for at, one in enumerate(bad)]
    warm.append(WarmPrompt(name="good", fields={"prompt": LAW}, place="x"))
    options = {"capacity": "4MB", "calibration_folder": None}
    with running_server(warm=warm, llm_options=options) as server, server.client() as client:
        lines = warmed(caplog)
        for line, field in zip(
            lines, ("ttl", "tags", "token_ids", "tokens", "prompt", "pin_share"), strict=False
        ):
            assert "cannot be computed (x)" in line
            assert field in line
        assert lines[-1] == f"1 of 7 {_DONE}"
        assert cached_tokens(client, LAW) > 100
    assert LAW not in caplog.text


def test_every_key_with_a_cache_of_its_own_gets_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where keys share it is computed once; neither takes from what a key may have at once."""
    caplog.set_level(logging.INFO)
    warm = [WarmPrompt(name="law", fields={"prompt": LAW})]
    with serving(tmp_path, warm=warm, api_keys=KEYS, max_requests_per_key=1) as server:
        assert len(warmed(caplog)) == 3
        for key in KEYS:
            with server.client(key) as client:
                assert cached_tokens(client, LAW) > 100
                assert [one["name"] for one in contexts(client)] == ["law"]

    caplog.clear()
    with running_server(warm=warm, api_keys=KEYS, isolate_keys=False) as server:
        assert len(warmed(caplog)) == 2
        with server.client(KEYS[1]) as client:
            assert cached_tokens(client, LAW) > 100


def test_requests_are_served_while_prompts_are_computed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Health is good from the moment the model is there, and the server stops without waiting for all."""
    caplog.set_level(logging.INFO)
    warm = [WarmPrompt(name=f"c{n}", fields={"prompt": f"{n} {LAW * 20}"}) for n in range(500)]
    options: dict[str, Any] = {"api_keys": KEYS[:1], "max_requests_per_key": 1}
    with running_server(warm=warm, **options) as server, server.client(KEYS[0]) as client:
        assert client.get("/health").status_code == 200
        # What is computed ahead takes nothing of what a key may have at once.
        for _ in range(20):
            cached_tokens(client, "Hello")
        assert len(contexts(client)) < 500
    assert _DONE not in caplog.text
