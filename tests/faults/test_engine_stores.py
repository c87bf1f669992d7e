"""Engines over real stores that are shared, restarted, hang and die: right tokens, counters that say why."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvkeep.config import CacheOptions, SamplingParams
from kvkeep.engine import Output
from kvkeep.errors import CorruptBlockError, RequestError
from kvkeep.llm import LLM
from kvkeep.testing.oracle import greedy
from kvkeep.testing.tiny_models import build_tiny
from kvkeep.tiers import Disk, Host, Remote, TierSettings
from tests.servers import S3_ACCESS_KEY, S3_SECRET_KEY, RcloneServer, RedisServer

BLOCK_SIZE = 8
NUM_TOKENS = 6
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
PROMPTS = [[3 + (7 * at + row) % 110 for at in range(40 + 5 * row)] for row in range(3)]
EVERYWHERE = ("finished", "reused", "idle", "evicted", "closing")


def engine(*tiers: TierSettings, name: str = "llama", **options: Any) -> LLM:
    """An engine over a tiny model."""
    settings: dict[str, Any] = {"block_size": BLOCK_SIZE, "capacity": "4MB", "idle_s": None}
    settings |= {"loading": "always", "calibration_folder": None}
    return LLM(build_tiny(name), tiers=tiers, **(settings | options))


@pytest.fixture(scope="module")
def truths() -> list[tuple[int, ...]]:
    """What the model says without a cache."""
    model = build_tiny("llama")
    return [greedy(model, prompt, NUM_TOKENS).token_ids for prompt in PROMPTS]


def tokens(outputs: Sequence[Output]) -> list[tuple[int, ...]]:
    """The tokens of each output."""
    return [output.token_ids for output in outputs]


def from_source(outputs: Sequence[Output], source: str) -> int:
    """Prompt tokens that came from there."""
    return sum(output.receipt.tokens_by_source.get(source, 0) for output in outputs)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of this test's own."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


def remote(server: RedisServer, timeout_s: float = 2.0) -> Remote:
    """It as a tier."""
    return Remote(server.url, timeout_s=timeout_s, write_on=EVERYWHERE)


def test_two_engines_share_their_work_over_a_server(
    redis: RedisServer, truths: list[tuple[int, ...]]
) -> None:
    """What one has computed the other loads, with nothing in common but the server."""
    with engine(remote(redis)) as first:
        assert tokens(first.generate(PROMPTS, GREEDY)) == truths
    with engine(remote(redis)) as second:
        outputs = second.generate(PROMPTS, GREEDY)
        assert tokens(outputs) == truths
        assert from_source(outputs, "remote") >= sum(len(prompt) // 8 * 8 - 8 for prompt in PROMPTS)
    with engine(remote(redis), name="mistral") as other:
        assert from_source(other.generate(PROMPTS, GREEDY), "remote") == 0


def test_objects_in_a_bucket_are_as_good(tmp_path: Path, truths: list[tuple[int, ...]]) -> None:
    """The same through an S3 server."""
    with RcloneServer(tmp_path) as server:
        store = Remote(
            "s3://bucket/kv",
            endpoint=server.endpoint,
            access_key=S3_ACCESS_KEY,
            secret_key=S3_SECRET_KEY,
            write_on=EVERYWHERE,
        )
        with engine(store) as first:
            assert tokens(first.generate(PROMPTS, GREEDY)) == truths
        with engine(store) as second:
            outputs = second.generate(PROMPTS, GREEDY)
            assert tokens(outputs) == truths
            assert from_source(outputs, "remote") > 0


@pytest.mark.parametrize("fault", ["killed", "hanging", "restarted empty"])
def test_a_server_that_fails_costs_time_and_nothing_else(
    redis: RedisServer, truths: list[tuple[int, ...]], fault: str
) -> None:
    """Requests finish with the right tokens; afterwards, when the server is well, it is used again."""
    with engine(remote(redis, timeout_s=0.3)) as llm:
        llm.generate(PROMPTS, GREEDY)
        llm.cache.offload()
        match fault:
            case "killed":
                redis.kill()
            case "hanging":
                redis.freeze()
            case _:
                redis.kill()
                redis.start()
        assert tokens(llm.generate(PROMPTS, GREEDY)) == truths
        assert llm.cache.verify().ok
        if fault == "hanging":
            redis.thaw()
        elif fault == "killed":
            redis.start()
    with engine(remote(redis)) as again:
        assert tokens(again.generate(PROMPTS, GREEDY)) == truths
    with engine(remote(redis)) as warm:
        outputs = warm.generate(PROMPTS, GREEDY)
        assert tokens(outputs) == truths
        assert from_source(outputs, "remote") > 0


def test_a_server_that_dies_between_look_up_and_load_is_a_gap(
    redis: RedisServer, truths: list[tuple[int, ...]]
) -> None:
    """The look-up has found blocks which then do not come: they are computed, and the receipt has a cause."""
    with engine(remote(redis, timeout_s=0.5)) as llm:
        llm.generate(PROMPTS, GREEDY)
        llm.cache.offload()
        for prompt in PROMPTS:
            llm.engine.add(prompt, GREEDY, CacheOptions())
        while llm.engine.cache._below.lookups.num_under_way:  # type: ignore[union-attr]
            llm.engine.cache.wait(0.1)
            llm.engine.cache.poll()
        redis.kill()
        pieces = []
        while llm.engine.has_work:
            pieces += llm.engine.step()
        receipts = [piece.receipt for piece in pieces if piece.receipt is not None]
        assert len(receipts) == len(PROMPTS)
        found: dict[int, list[int]] = {}
        for piece in pieces:
            found.setdefault(piece.request_id, []).extend(piece.token_ids)
        assert sorted(map(tuple, found.values())) == sorted(truths)
        causes = {cause for receipt in receipts for cause in receipt.load_failures}
        assert causes
        assert causes <= {"unavailable", "late", "absent"}


_CHILD = """
import json, sys
from pathlib import Path
from tests.faults.test_engine_stores import GREEDY, PROMPTS, engine, from_source, tokens
from kvkeep.tiers import Disk
with engine(Disk(Path(sys.argv[1]), "64MB")) as llm:
    outputs = llm.generate(PROMPTS, GREEDY)
print(json.dumps([tokens(outputs), from_source(outputs, "disk")]))
"""


def test_processes_with_other_hash_seeds_find_each_others_blocks(
    tmp_path: Path, truths: list[tuple[int, ...]]
) -> None:
    """Names of content are the same in every process."""
    answers = [in_process(tmp_path, seed) for seed in ("1", "2")]
    assert [[tuple(ids) for ids in answer[0]] for answer in answers] == [truths, truths]
    assert answers[0][1] == 0
    assert answers[1][1] > 0


def in_process(folder: Path, seed: str) -> list[Any]:
    """What a process of that seed generates, and how much of it from disk."""
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, str(folder)],
        env={"PYTHONHASHSEED": seed, "PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(folder)},
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
        text=True,
    )
    answer: list[Any] = json.loads(child.stdout.splitlines()[-1])
    return answer


def test_a_cache_is_exported_and_imported(tmp_path: Path, truths: list[tuple[int, ...]]) -> None:
    """A file of chains warms another engine, from the device and from tiers, into the device or tiers."""
    path = tmp_path / "warm.safetensors"
    with engine(Host("16MB")) as llm:
        llm.generate(PROMPTS, GREEDY)
        exported = llm.cache.export(path, PROMPTS)
        assert exported.num_blocks == sum(len(prompt) // BLOCK_SIZE for prompt in PROMPTS)
        llm.cache.offload()
        again = llm.cache.export(tmp_path / "again.safetensors", PROMPTS)
        assert again == exported
        assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    with engine() as plain:
        assert plain.cache.import_(path).num_added == exported.num_blocks
        assert plain.cache.import_(path).num_present == exported.num_blocks
        outputs = plain.generate(PROMPTS, GREEDY)
        assert tokens(outputs) == truths
        assert sum(output.receipt.computed_tokens for output in outputs) <= 3 * BLOCK_SIZE
    with engine(Disk(tmp_path / "disk", "64MB"), capacity="40KB", max_requests=1) as small:
        receipt = small.cache.import_(path)
        assert receipt.num_added == exported.num_blocks
        assert sum(1 for _ in (tmp_path / "disk").rglob("*") if _.is_file()) > 1
        assert small.cache.coverage(PROMPTS[0]).known_tokens >= len(PROMPTS[0]) // 8 * 8


def test_a_file_of_another_model_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    """Beside the same file undamaged in the same engine, which is taken."""
    path = tmp_path / "warm.safetensors"
    with engine() as llm:
        llm.generate(PROMPTS, GREEDY)
        llm.cache.export(path, PROMPTS)
    with engine(name="mistral") as other, pytest.raises(RequestError, match="model="):
        other.cache.import_(path)
    with engine() as salted, pytest.raises(RequestError, match="namespace="):
        salted.cache.import_(path, salt="tenant")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(content)
    (tmp_path / "short.safetensors").write_bytes(content[:-100])
    (tmp_path / "text.safetensors").write_text("no tensors at all")
    with engine() as llm:
        for name in ("flipped", "short", "text"):
            with pytest.raises(CorruptBlockError):
                llm.cache.import_(tmp_path / f"{name}.safetensors")
        with pytest.raises(RequestError, match="prompts is empty"):
            llm.cache.export(path, [])
        assert llm.cache.import_(path).num_added + llm.cache.import_(path).num_present > 0
