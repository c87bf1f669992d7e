"""The routes of the cache over real HTTP: what is known, why not more, and what a purge really removed."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.running_server import RunningServer, running_server
from tests.servers import wait_until

RULES = "Answer in one sentence and name the source of everything that you say. " * 6


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    """A client of the module's server, whose cache is empty at the start of every test."""
    with server.client() as one:
        one.post("/v1/cache/purge", json={"all": True, "include_pinned": True}).raise_for_status()
        yield one


def chat(system: str, *turns: str) -> list[dict[str, str]]:
    """Messages of a conversation: system text, then user and assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": text} for at, text in enumerate(turns)]
    return [{"role": "system", "content": system}, *messages]


def complete(client: httpx.Client, prompt: str, **kv_cache: Any) -> dict[str, Any]:
    """A request with options of the cache, and one token of output."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 1, "kv_cache": kv_cache}
    answer = client.post("/v1/completions", json=body)
    answer.raise_for_status()
    return dict(answer.json())


def look_up(client: httpx.Client, **prompt: Any) -> dict[str, Any]:
    """What is known of a prompt."""
    answer = client.post("/v1/cache/lookup", json=prompt)
    answer.raise_for_status()
    return dict(answer.json())


def purge(client: httpx.Client, **selector: Any) -> dict[str, Any]:
    """The receipt of a purge."""
    answer = client.post("/v1/cache/purge", json=selector)
    answer.raise_for_status()
    return dict(answer.json())


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a refused request."""
    assert answer.status_code == status, answer.text
    return dict(answer.json()["error"])


def test_the_state_adds_up_and_names_the_content(client: httpx.Client) -> None:
    """In use, reusable and free are all there is; the fingerprint says whose blocks these are."""
    complete(client, RULES)

    state = client.get("/v1/cache").json()

    device = state["tiers"]["device"]
    parts = device["in_use_bytes"] + device["reusable_bytes"] + device["free_bytes"]
    assert parts == device["capacity_bytes"]
    assert device["used_bytes"] > 0
    assert device["entries"] > 0
    assert len(state["fingerprint"]) >= 32
    assert state["block_size"] == 32


def test_a_prompt_that_nobody_sent_is_a_first_request(client: httpx.Client) -> None:
    """Nothing is known, and asking does not make it known."""
    words = "Never before has anybody told this server of the otters of Lake Ohrid. " * 4
    for _ in range(2):
        known = look_up(client, prompt=words)

        assert known["status"] == "miss"
        assert known["known_tokens"] == 0
        assert known["missing_tokens"] == known["total_tokens"]
        assert known["miss"]["type"] == "first_request"


def test_what_was_sent_is_known(client: httpx.Client) -> None:
    """All full blocks, in all three forms of a prompt, and where they are."""
    complete(client, RULES)
    ids = client.post("/tokenize", json={"prompt": RULES}).json()["tokens"]

    for prompt in ({"prompt": RULES}, {"token_ids": ids}):
        known = look_up(client, **prompt)

        assert known["total_tokens"] == len(ids)
        assert known["known_tokens"] >= len(ids) // 32 * 32
        assert known["tiers"]["device"] == known["known_tokens"]
        assert known["miss"] is None
        assert known["ttft_ms_est"] > 0
        assert sum(run["stop"] - run["start"] for run in known["runs"]) == len(ids)


def test_a_changed_system_text_is_told_with_both_texts(client: httpx.Client) -> None:
    """The message, the token, and what stood there before and now."""
    old, new = (chat(f"It is {time} now. {RULES}", "Hello?") for time in ("14:19", "14:20"))
    body = {"model": "tiny", "messages": old, "max_tokens": 1}
    client.post("/v1/chat/completions", json=body).raise_for_status()

    miss = look_up(client, messages=new)["miss"]

    assert miss["type"] == "system_changed"
    assert miss["message_index"] == 0
    assert 0 < miss["first_divergent_token"] < 40
    assert "19 now" in miss["cached_text"]
    assert "20 now" in miss["sent_text"]
    assert miss["missed_tokens"] > 100


def test_a_purge_is_told_to_who_asks_why(client: httpx.Client) -> None:
    """Blocks that were removed on purpose were invalidated."""
    complete(client, RULES, tags=["doc:1"])
    purge(client, tags=["doc:1"])

    miss = look_up(client, prompt=RULES)["miss"]

    assert miss["type"] == "invalidated"
    assert miss["missed_tokens"] >= 64


def test_a_dry_run_says_what_a_purge_then_does(client: httpx.Client) -> None:
    """The same numbers, and nothing done; then done; then nothing left."""
    complete(client, RULES, tags=["doc:77"])
    complete(client, f"Other text. {RULES}")
    before = look_up(client, prompt=RULES)["known_tokens"]

    planned = purge(client, tags=["doc:77"], dry_run=True)

    assert look_up(client, prompt=RULES)["known_tokens"] == before
    done = purge(client, tags=["doc:77"])
    assert done == planned | {"dry_run": False}
    assert done["deleted"] == before // 32
    assert done["freed_bytes"] > 0
    assert look_up(client, prompt=RULES)["known_tokens"] < 32
    assert look_up(client, prompt=f"Other text. {RULES}")["known_tokens"] >= 32
    assert purge(client, tags=["doc:77"])["matched"] == 0


def test_a_purge_by_prefix_removes_just_that_prompt(client: httpx.Client) -> None:
    """The full blocks of the prompt that is given."""
    first, second = f"First. {RULES}", f"Second. {RULES}"
    complete(client, first)
    complete(client, second)

    receipt = purge(client, prefix={"prompt": first})

    assert receipt["deleted"] > 0
    assert look_up(client, prompt=first)["known_tokens"] < 32
    assert look_up(client, prompt=second)["known_tokens"] >= 32


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "names no block"),
        ({"dry_run": True}, "names no block"),
        ({"all": True, "tags": ["a"]}, "nothing to choose"),
        ({"sesions": ["a"]}, "sesions"),
        ({"tags": "a"}, "tags"),
        ({"tags": ["a"], "tiers": ["attic"]}, "attic"),
        ({"older_than": "soon"}, "older_than"),
        ({"older_than": "never"}, "older_than"),
        ({"unused_for": "never"}, "unused_for"),
        ({"prefix": {}}, "0 of messages"),
        ({"prefix": {"prompt": ""}}, "0 tokens"),
    ],
)
def test_a_purge_that_means_nothing_is_refused(
    client: httpx.Client, body: dict[str, Any], word: str
) -> None:
    """What is misspelt, empty or contradictory removes nothing, and the answer says what is wrong."""
    complete(client, RULES)

    error = error_of(client.post("/v1/cache/purge", json=body), 400)

    assert word in error["message"]
    assert look_up(client, prompt=RULES)["known_tokens"] >= 32


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "a", "token_ids": [1]},
        {"prompt": ""},
        {"token_ids": [-1]},
        {"token_ids": [2**32]},
        {"token_ids": [2**32 - 1] * 64},
        {"token_ids": ["a"]},
        {"messages": [{"role": "user"}], "prompt": "a"},
        {"prompt": "a", "model": "other"},
    ],
)
def test_a_lookup_without_one_prompt_is_refused(client: httpx.Client, body: dict[str, Any]) -> None:
    """Exactly one form, of tokens that can be, for the model that is served."""
    answer = client.post("/v1/cache/lookup", json=body)

    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["message"]


def test_a_session_is_listed_forked_and_closed(client: httpx.Client) -> None:
    """Closing forgets what only it used; what its fork uses stays until that is closed too."""
    complete(client, RULES, session="s/1")
    (listed,) = client.get("/v1/cache/sessions").json()["data"]
    assert listed["id"] == "s/1"
    assert listed["own_blocks"] == listed["blocks"] > 0

    fork = client.post("/v1/cache/sessions/s%2F1/fork", json={"session": "child"})
    assert fork.status_code == 201
    assert fork.json()["blocks"] == listed["blocks"]
    first = client.delete("/v1/cache/sessions/s%2F1").json()
    assert first["deleted"] == 0
    assert look_up(client, prompt=RULES)["known_tokens"] >= 32

    assert client.delete("/v1/cache/sessions/child", params={"dry_run": True}).json()["deleted"] > 0
    assert client.delete("/v1/cache/sessions/child").json()["deleted"] == listed["blocks"]
    assert look_up(client, prompt=RULES)["known_tokens"] < 32
    assert client.get("/v1/cache/sessions").json()["data"] == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/cache/sessions/nobody"),
        ("DELETE", "/v1/cache/sessions/nobody"),
        ("POST", "/v1/cache/sessions/nobody/export"),
        ("GET", "/v1/cache/contexts/nothing"),
        ("DELETE", "/v1/cache/contexts/nothing"),
        ("GET", "/v1/cache/entries/" + "ab" * 32),
        ("DELETE", "/v1/cache/entries/" + "ab" * 32),
        ("GET", "/v1/cache/entries/no-hex"),
        ("GET", "/v1/cache/entries?after=gone"),
        ("DELETE", "/v1/cache/pins/nothing"),
        ("GET", "/v1/cache/quotas/nobody"),
        ("DELETE", "/v1/cache/quotas/nobody"),
    ],
)
def test_what_is_not_there_is_404(client: httpx.Client, method: str, path: str) -> None:
    """No success without effect."""
    assert error_of(client.request(method, path), 404)["message"]


def test_entries_come_in_pages_and_one_can_be_removed(client: httpx.Client) -> None:
    """Every block once, in the order that is asked; a removed one is no longer found."""
    complete(client, RULES, tags=["doc:1"], session="s")
    complete(client, f"Other. {RULES}")
    every = client.get("/v1/cache/entries", params={"limit": 1000}).json()["data"]
    seen: list[str] = []
    after = None
    while True:
        query = {"limit": 3} if after is None else {"limit": 3, "after": after}
        page = client.get("/v1/cache/entries", params=query).json()
        seen += [one["id"] for one in page["data"]]
        after = page["last_id"]
        if not page["has_more"]:
            break

    assert seen == [one["id"] for one in every]
    assert len(set(seen)) == len(seen) > 6
    tagged = client.get("/v1/cache/entries", params={"tag": "doc:1"}).json()["data"]
    assert 0 < len(tagged) < len(every)
    assert all(one["tags"] == ["doc:1"] and one["sessions"] == ["s"] for one in tagged)
    one = client.get(f"/v1/cache/entries/{tagged[0]['id']}").json()
    assert one == tagged[0]
    assert client.delete(f"/v1/cache/entries/{one['id']}").json()["deleted"] == 1
    error_of(client.get(f"/v1/cache/entries/{one['id']}"), 404)


def test_blocks_of_equal_labels_are_one_row(client: httpx.Client) -> None:
    """The sums of a row are those of its blocks."""
    complete(client, RULES, tags=["doc:1"])
    complete(client, f"Other. {RULES}", tags=["doc:2"])

    rows = client.get("/v1/cache/entries", params={"by": "labels"}).json()["data"]

    assert {tuple(row["tags"]) for row in rows} == {("doc:1",), ("doc:2",)}
    for row in rows:
        blocks = client.get("/v1/cache/entries", params={"tag": row["tags"][0]}).json()["data"]
        assert row["blocks"] == len(blocks)
        assert row["bytes"] == sum(one["bytes"] for one in blocks)
        assert row["tiers"] == {"device": len(blocks)}


@pytest.mark.parametrize(
    "query", [{"limit": 0}, {"limit": 9999}, {"sort": "colour"}, {"tags": "a"}]
)
def test_a_list_that_cannot_be_is_refused(client: httpx.Client, query: dict[str, Any]) -> None:
    """Limits and names of parameters are checked."""
    error = error_of(client.get("/v1/cache/entries", params=query), 400)

    assert error["type"] == "invalid_request_error"
    assert next(iter(query)) in error["message"] + str(error["param"])


def test_the_routes_of_other_servers_clear_and_say_so(client: httpx.Client) -> None:
    """Those of vLLM and SGLang: the answer has the counts, and the cache is empty."""
    for method, path in (
        ("POST", "/reset_prefix_cache"),
        ("POST", "/flush_cache"),
        ("GET", "/flush_cache"),
    ):
        complete(client, RULES)
        receipt = client.request(method, path).json()

        assert receipt["deleted"] > 0
        assert look_up(client, prompt=RULES)["known_tokens"] < 32


def test_an_exported_session_is_known_to_another_server(client: httpx.Client) -> None:
    """The file holds the blocks; what is no such file is refused and changes nothing."""
    complete(client, RULES, session="s")
    answer = client.post("/v1/cache/sessions/s/export")
    answer.raise_for_status()
    assert answer.headers["content-type"] == "application/octet-stream"
    known = look_up(client, prompt=RULES)["known_tokens"]
    with running_server() as other, other.client() as second:
        error = error_of(second.post("/v1/cache/import", content=b"no such file"), 400)
        assert "the file is damaged" in error["message"]
        imported = second.post("/v1/cache/import", content=answer.content).json()

        assert imported["added"] > 0
        assert imported["no_room"] == 0
        assert look_up(second, prompt=RULES)["known_tokens"] >= known // 32 * 32
        again = second.post("/v1/cache/import", content=answer.content).json()
        assert again["added"] == 0
        assert again["present"] == imported["added"]


def test_blocks_below_the_device_are_seen_and_purged_there() -> None:
    """A lookup says in which tier they are; a purge of one place leaves the others, and names its objects."""
    tiers = ["host:64MB"]
    with (
        running_server(tiers=tiers, llm_options={"idle_s": 0.1}) as server,
        server.client() as client,
    ):
        complete(client, RULES)
        wait_until(
            lambda: look_up(client, prompt=RULES)["tiers"].get("host", 0) >= 64, "blocks go down"
        )
        (row,) = client.get("/v1/cache/entries", params={"by": "labels"}).json()["data"]
        assert row["tiers"]["host"] == row["blocks"]
        assert client.get("/v1/cache").json()["tiers"]["host"]["entries"] == row["blocks"]

        assert purge(client, all=True, tiers=["device"])["tiers"] == {}
        assert look_up(client, prompt=RULES)["tiers"]["host"] >= 64
        gone = purge(client, all=True)

        assert gone["tiers"] == {"host": row["blocks"]}
        assert gone["freed_bytes"] > 0
        assert look_up(client, prompt=RULES)["known_tokens"] == 0
        assert client.get("/v1/cache").json()["tiers"]["host"]["entries"] == 0


def test_the_bookkeeping_can_be_checked(client: httpx.Client, server: RunningServer) -> None:
    """All is well, until a block's state is changed behind the books."""
    complete(client, RULES)
    sound = client.post("/v1/cache/verify", json={"tiers": True}).json()
    pool = server.service.llm.engine.cache._pools[0]
    free = pool._free.pop()
    try:
        wrong = client.post("/v1/cache/verify").json()
    finally:
        pool._free.append(free)

    assert sound["ok"]
    assert sound["blocks_checked"] > 0
    assert sound["problems"] == []
    assert not wrong["ok"]
    assert wrong["problems"]
