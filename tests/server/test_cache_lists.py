"""Lists of many blocks over HTTP: asked in bits, with reports on what is shown only."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest

from kvkeep.cache import listing
from kvkeep.cache.slices import Sliced
from kvkeep.spec import BlockKey
from kvkeep.tiers.base import Labelled
from kvkeep.tiers.disk import DiskTier
from tests.running_server import RunningServer, running_server

ANNA, BERT = "key-of-anna", "key-of-bert"
NUM_BLOCKS = 300
_MOST_AT_ONCE = 64


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """Two tenants without an administrator; one has 300 blocks on the device and below."""
    options = {"block_size": 2, "idle_s": None}
    with running_server(api_keys=(ANNA, BERT), tiers=["host:64MB"], llm_options=options) as running:
        complete(running, ANNA, range(1, 2 * NUM_BLOCKS + 2), tags=["long"])
        yield running


@pytest.fixture
def anna(server: RunningServer) -> Iterator[httpx.Client]:
    """A client of the first tenant."""
    with server.client(ANNA) as client:
        yield client


def complete(server: RunningServer, key: str | None, ids: Sequence[int], **kv_cache: Any) -> None:
    """A request that leaves its prompt in the cache."""
    body = {"model": "tiny", "prompt": list(ids), "max_tokens": 1, "kv_cache": kv_cache}
    with server.client(key) as client:
        client.post("/v1/completions", json=body).raise_for_status()


def ask(client: httpx.Client, method: str, path: str, **options: Any) -> dict[str, Any]:
    """An answer that is no error."""
    answer = client.request(method, path, **options)
    answer.raise_for_status()
    return dict(answer.json())


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks were looked up in all places, each time that some were."""
    counts: list[int] = []
    look = listing.held_blocks

    def look_and_count(keys: Sequence[BlockKey], *rest: Any) -> list[listing.Held]:
        counts.append(len(keys))
        return look(keys, *rest)

    monkeypatch.setattr("kvkeep.cache.listing.held_blocks", look_and_count)
    monkeypatch.setattr("kvkeep.cache.inspection.held_blocks", look_and_count)
    return counts


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Time is up after every bit; has an entry for every slice."""
    taken: list[bool] = []
    go_on = Sliced.go_on

    def go_on_and_count(work: Sliced[Any]) -> bool:
        taken.append(go_on(work))
        return taken[-1]

    monkeypatch.setattr("kvkeep.cache.slices._SLICE_S", -1.0)
    monkeypatch.setattr(Sliced, "go_on", go_on_and_count)
    return taken


@pytest.mark.parametrize(
    ("method", "path", "options"),
    [
        ("GET", "/v1/cache/entries?limit=1", {}),
        ("GET", "/v1/cache/entries?by=labels", {}),
        ("GET", "/v1/cache/entries?sort=bytes&tier=device", {}),
        ("GET", "/v1/cache", {}),
        ("POST", "/v1/cache/verify", {"json": {"tiers": True}}),
    ],
)
def test_decoding_goes_on_between_bits_of_a_question(
    anna: httpx.Client,
    looked_at: list[int],
    slices: list[bool],
    method: str,
    path: str,
    options: dict[str, Any],
) -> None:
    """Every question about all blocks is several orders, and none of these looks at many."""
    ask(anna, method, path, **options)

    assert len(slices) > NUM_BLOCKS // _MOST_AT_ONCE
    assert all(count <= _MOST_AT_ONCE for count in looked_at)


def test_decoding_goes_on_while_a_purge_is_planned(
    anna: httpx.Client, slices: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run counts in parts what would go, from the device and from below."""
    monkeypatch.setattr("kvkeep.cache.forgetting._SLICE", _MOST_AT_ONCE)

    receipt = ask(anna, "POST", "/v1/cache/purge", json={"tags": ["long"], "dry_run": True})

    assert receipt["deleted"] == NUM_BLOCKS
    assert receipt["dry_run"]
    assert len(slices) > NUM_BLOCKS // _MOST_AT_ONCE


def test_a_list_of_one_is_a_report_of_one(anna: httpx.Client, looked_at: list[int]) -> None:
    """The order of last use and that of creation need no more than that."""
    for sort in ("last_used", "created"):
        looked_at.clear()
        page = ask(anna, "GET", "/v1/cache/entries", params={"limit": 1, "sort": sort})

        assert len(page["data"]) == 1
        assert page["has_more"]
        assert sum(looked_at) == 1


def test_an_entry_is_found_by_digits_without_reports_on_others(
    anna: httpx.Client, looked_at: list[int]
) -> None:
    """By all digits, by eight, in capital letters; an unknown one is 404."""
    page = ask(anna, "GET", "/v1/cache/entries", params={"limit": 1})
    entry_id = page["data"][0]["id"]
    for digits in (entry_id, entry_id[:8], entry_id[:9].upper()):
        looked_at.clear()

        assert ask(anna, "GET", f"/v1/cache/entries/{digits}")["id"] == entry_id
        assert sum(looked_at) == 1
    assert anna.get(f"/v1/cache/entries/{'0' * 8}").status_code == 404
    assert anna.get(f"/v1/cache/entries/{'0' * 64}").status_code == 404


@pytest.mark.parametrize("sort", ["last_used", "created", "bytes"])
def test_pages_of_a_long_list_have_every_block_once(anna: httpx.Client, sort: str) -> None:
    """From the first to the last, in one order whatever the pages' length."""
    query: dict[str, Any] = {"sort": sort, "tag": "long"}
    every = ask(anna, "GET", "/v1/cache/entries", params=query | {"limit": 1000})
    seen: list[str] = []
    while True:
        page = ask(anna, "GET", "/v1/cache/entries", params=query | {"limit": 70})
        seen += [one["id"] for one in page["data"]]
        if not page["has_more"]:
            break
        query["after"] = page["last_id"]

    assert seen == [one["id"] for one in every["data"]]
    assert len(set(seen)) == NUM_BLOCKS
    assert not every["has_more"]


def test_groups_come_in_pages(server: RunningServer, anna: httpx.Client) -> None:
    """The largest first; behind the last there is nothing, and behind an unknown one 404."""
    complete(server, ANNA, range(300, 320), tags=["short"])
    query: dict[str, Any] = {"by": "labels", "limit": 1}
    first = ask(anna, "GET", "/v1/cache/entries", params=query)
    second = ask(anna, "GET", "/v1/cache/entries", params=query | {"after": first["last_id"]})

    assert [one["tags"] for one in first["data"] + second["data"]] == [["long"], ["short"]]
    assert (first["has_more"], second["has_more"]) == (True, False)
    for path in ("?after=ff", "?after=" + "f" * 64, "?by=labels&after=ff"):
        answer = anna.get(f"/v1/cache/entries{path}")
        assert answer.status_code == 404
        assert answer.json()["error"]["param"] == "after"


def test_a_check_tells_a_tenant_of_its_own_alone(server: RunningServer) -> None:
    """What another computes changes no number, on the device or below."""
    with server.client(BERT) as bert:
        body = {"json": {"tiers": True}}
        before = ask(bert, "POST", "/v1/cache/verify", **body)
        complete(server, ANNA, range(400, 440))
        after = ask(bert, "POST", "/v1/cache/verify", **body)
        complete(server, BERT, range(400, 440))
        own = ask(bert, "POST", "/v1/cache/verify", **body)

    assert before == after == {"ok": True, "blocks_checked": 0, "problems": []}
    assert own["ok"]
    assert 20 <= own["blocks_checked"] < 60


def test_a_list_that_waits_for_a_slow_disk_lets_requests_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right after a start the labels of a big folder are still being read; then the list is whole."""
    tiers, options = [f"disk:{tmp_path}:64MB"], {"block_size": 2}
    with running_server(tiers=tiers, llm_options=options) as first:
        complete(first, None, range(1, 9), session="old")
    may_read, read, was_in_time = Event(), DiskTier.labelled, list[bool]()

    def read_later(tier: DiskTier) -> Iterator[Labelled]:
        was_in_time.append(may_read.wait(10))
        return read(tier)

    monkeypatch.setattr(DiskTier, "labelled", read_later)
    with (
        running_server(tiers=tiers, llm_options=options) as again,
        again.client() as client,
        ThreadPoolExecutor(1) as pool,
    ):
        listed = pool.submit(ask, client, "GET", "/v1/cache/sessions")
        complete(again, None, range(20, 29))
        assert not listed.done()
        may_read.set()

        assert [one["id"] for one in listed.result()["data"]] == ["old"]
        assert all(was_in_time)
