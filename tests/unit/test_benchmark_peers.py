"""The comparison with other engines: its driver, its protocol and its table, on tiny sizes."""

import json
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.peers import compare
from benchmarks.peers.crew import Agreement, Crew
from benchmarks.peers.engines import ENGINES, FIELDS, ROOT, EngineSpec
from benchmarks.peers.llamacpp_state import StateFormatError, parse_state
from benchmarks.peers.measuring import Cell, Rounds, measure_point
from benchmarks.peers.plan import Decode, FirstToken, Heat, Stage, Unfit, heats_of, need_bytes
from benchmarks.peers.prepare import Prepared
from benchmarks.peers.protocol import EITHER, ONE, OWN, Opening, RefusalError, sharing_within
from benchmarks.peers.turns import take_turns
from benchmarks.peers.worker_process import Worker, WorkerError
from benchmarks.shapes import SHAPES

GIB = 2**30
LLAMA = SHAPES["llama-1b"]


@pytest.mark.slow
def test_kvkeep_and_transformers_are_compared_from_end_to_end(tmp_path: Path) -> None:
    """Two real workers give the same tokens, times at every point, ratios, and both results files."""
    report = compare.main(["--quick", "--threads", "1", "--results", str(tmp_path)])

    assert report is not None
    written = json.loads((tmp_path / "peers.json").read_text())
    table = (tmp_path / "peers.md").read_text()
    points = [point.label for point in compare.QUICK.stages[0].points]
    assert [cell.point for cell in report.cells if cell.engine == "transformers"] == points
    for cell in report.cells:
        assert cell.reason is None, cell
        assert len(cell.seconds) >= 1
        assert len(cell.over_ours) == (0 if cell.engine == "kvkeep" else len(cell.seconds))
    agreement = report.facts["kvkeep"].agreement
    assert agreement is not None
    assert agreement.share > 0.7
    assert all(f"| {point}, 16-bit K/V |" in table for point in points)
    assert "x) |" in table
    assert "| K/V memory of a token, 16-bit K/V | 0.3 to 0.4 KiB |" in table
    assert str(tmp_path) not in written["command"]
    assert {"findings", "machine", "commit", "cells"} <= written.keys()


# --- a worker of the test's own ------------------------------------------------------------------

WORKER = """
import os, sys
sys.path.insert(0, {root!r})
from benchmarks.peers.protocol import Filled, RefusalError, serve

class Toy:
    vocabulary = 100
    def __init__(self, options): self.kv = options.kv
    def describe(self): return {{"versions": "toy 1", "precision": "none", "fills": "prefill"}}
    def generate(self, prompts, num_tokens):
        print("noise on the output")
        return [[sum(ids) % 100 + (self.kv == "wrong")] * num_tokens for ids in prompts]
    def open(self, opening):
        if self.kv == "full": raise RefusalError("no room")
        return Filled(how="nothing", is_shared=self.kv == "sharing" or opening.sharing == "one", kv_bytes=1)
    def step(self):
        if self.kv == "dying": print("out of luck", file=sys.stderr); os._exit(3)
        if self.kv == "failing": raise ValueError("no step")
    def close(self): pass
    def warm(self, prefix): return "nothing"
    def first_token(self, prompt): assert prompt

serve(Toy)
"""


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    """Engines by the names of real ones whose workers compute nothing."""
    (tmp_path / "toy_worker.py").write_text(WORKER.format(root=str(ROOT)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Prepared(Path(sys.executable), tmp_path)


def toy(name: str, kv: str) -> EngineSpec:
    """A toy under a real engine's name; `kv` says what goes wrong with it."""
    return EngineSpec(name=name, label=ENGINES[name].label, module="toy_worker", kv=kv)


def crew_of(
    toys: Prepared, monkeypatch: pytest.MonkeyPatch, **name_to_kv: str
) -> tuple[Crew, Heat]:
    """A crew of toys, manned for one heat."""
    for name, kv in name_to_kv.items():
        monkeypatch.setitem(ENGINES, name, toy(name, kv))
    crew = Crew(prepared=dict.fromkeys(name_to_kv, toys), threads=1, logs=toys.model, reasons={})
    peers = tuple(name for name in name_to_kv if name != "kvkeep")
    heat = Heat(FIELDS[0], peers, Stage((Decode(2, 8),)))
    crew.man(heat)
    return crew, heat


def measured(crew: Crew, heat: Heat, point: Decode | FirstToken) -> dict[str, Cell]:
    """The cells of a point by engine; ends the crew."""
    rounds = Rounds(decode=3, first_token=2, at_least=1, warmups=1)
    cells = measure_point(crew, heat, point, rounds, budget_s=60.0, rest_s=100.0)
    crew.close()
    return {cell.engine: cell for cell in cells}


def test_a_peer_that_dies_costs_its_own_cell(
    toys: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cell says how it ended; the others are measured all the same."""
    crew, heat = crew_of(
        toys, monkeypatch, kvkeep="", transformers="", openvino="dying", llamacpp="full"
    )
    cells = measured(crew, heat, Decode(2, 8))

    assert cells["openvino"].reason == "its process ended: out of luck"
    assert cells["llamacpp"].reason == "no room"
    assert len(cells["transformers"].over_ours) == 3
    assert len(cells["kvkeep"].seconds) == 3
    assert cells["kvkeep"].reason is None


def test_a_peer_that_computes_something_else_is_not_measured(
    toys: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Speed without the same tokens is no result."""
    crew, heat = crew_of(toys, monkeypatch, kvkeep="", transformers="", vllm="wrong")
    cells = measured(crew, heat, Decode(1, 8))

    assert cells["vllm"].seconds == []
    assert "it computes something else" in (cells["vllm"].reason or "")
    assert not crew.may_start("vllm")


def test_kvkeep_shares_a_context_beside_a_peer_that_does(
    toys: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pair of times is of equal work: kvkeep is measured with and without, and shows the latter."""
    crew, heat = crew_of(toys, monkeypatch, kvkeep="", transformers="", openvino="sharing")
    cells = measured(crew, heat, Decode(2, 8))

    assert cells["openvino"].is_shared
    assert not cells["transformers"].is_shared
    assert len(cells["kvkeep"].seconds) == 3
    assert len(cells["openvino"].over_ours) == 3


def test_without_kvkeep_there_is_no_row(toys: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """When kvkeep itself fails, no peer has a time, and each says why."""
    crew, heat = crew_of(toys, monkeypatch, kvkeep="failing", transformers="")
    cells = measured(crew, heat, Decode(2, 8))

    assert cells["kvkeep"].reason == "ValueError: no step"
    assert cells["transformers"].reason == "kvkeep: ValueError: no step"


def test_a_prompt_too_slow_to_compute_is_refused_with_its_time(
    toys: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rate of an earlier point tells what a longer one would take."""
    crew, heat = crew_of(toys, monkeypatch, kvkeep="", transformers="", llamacpp="")
    crew.facts["llamacpp"].tokens_per_s = 10.0
    cells = measured(crew, heat, FirstToken(0, 1000))

    assert cells["llamacpp"].reason == "it would take 100 s, 30 s were given"
    assert len(cells["transformers"].seconds) == 2


def test_a_worker_that_does_not_start_says_so(
    toys: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last words of its log are the reason."""
    spec = EngineSpec(name="vllm", label="vLLM", module="no_such_worker")
    with pytest.raises(WorkerError, match=r"its process ended: .*No module named no_such_worker"):
        Worker(spec, toys, threads=1, capacity_tokens=64, log=toys.model / "log")


# --- decisions -----------------------------------------------------------------------------------


def opening(sharing: str, batch: int = 8) -> Opening:
    """Contexts of 1,000 tokens, 30 seconds for all of them or 20 for one."""
    return Opening(batch=batch, context=1000, seed=0, limit_s=30.0, most_s=20.0, sharing=sharing)


@pytest.mark.parametrize(
    ("sharing", "tokens_per_s", "is_shared"),
    [(EITHER, 300.0, False), (EITHER, 100.0, True), (OWN, 300.0, False), (ONE, 300.0, True)],
)
def test_contexts_are_shared_when_there_is_no_time_for_all(
    sharing: str, tokens_per_s: float, is_shared: bool
) -> None:
    """What is asked for is kept, and else time decides."""
    assert sharing_within(opening(sharing), tokens_per_s) == is_shared
    assert not sharing_within(opening(sharing, 1), tokens_per_s)


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (opening(EITHER), "filling one context would take 100 s, 20 s were given"),
        (opening(EITHER, 1), "filling one context would take 100 s, 20 s were given"),
        (opening(OWN), "filling would take 800 s, 30 s were given"),
    ],
)
def test_contexts_that_take_too_long_are_refused(one: Opening, words: str) -> None:
    """The refusal says what it would take."""
    with pytest.raises(RefusalError, match=words):
        sharing_within(one, 10.0)


def test_shared_prompts_differ_in_their_last_token_only() -> None:
    """Contexts are one or as many as requests; last tokens are each request's own."""
    own = opening(OWN).prompts(10**6, is_shared=False)
    one = opening(ONE).prompts(10**6, is_shared=True)

    assert len({tuple(ids[:-1]) for ids in own}) == 8
    assert len({tuple(ids[:-1]) for ids in one}) == 1
    assert len({ids[-1] for ids in one}) == 8
    assert {len(ids) for ids in own + one} == {1001}


def test_engines_that_fit_into_memory_are_alive_together() -> None:
    """Else kvkeep meets the peers in several heats; who cannot fit beside it is named with its need."""
    stage = Stage((Decode(32, 4096),))
    names = ["kvkeep", "transformers", "openvino", "llamacpp"]
    both = need_bytes("kvkeep", LLAMA, stage.tokens) + need_bytes("openvino", LLAMA, stage.tokens)

    together = heats_of([stage], names, LLAMA, 64 * GIB)
    apart = heats_of([stage], names, LLAMA, both)
    never = heats_of([stage], names, LLAMA, both // 2)

    assert [heat.peers for heat in together if isinstance(heat, Heat)] == [
        ("transformers", "openvino", "llamacpp")
    ]
    assert [heat.peers for heat in apart if isinstance(heat, Heat)] == [
        ("transformers",), ("openvino",), ("llamacpp",),
    ]  # fmt: skip
    assert all(isinstance(heat, Unfit) for heat in never)
    assert len(never) == 3
    assert "both engines need 15 GiB, 8 are free" in never[0].reason  # type: ignore[union-attr]  # all are Unfit


def test_kvkeep_is_beside_every_engine_that_is_asked_for() -> None:
    """In the K/V formats of the peers that were named, and in no other."""
    assert compare.with_ours(["openvino", "vllm"]) == ("kvkeep", "openvino", "vllm")
    assert compare.with_ours(["openvino-u8", "kvkeep-int8"]) == ("kvkeep-int8", "openvino-u8")


def test_sides_take_turns_and_another_one_begins_each_round() -> None:
    """Warm-ups do not count, and a spent budget leaves rounds out."""
    calls: list[str] = []

    def side(name: str, number: int) -> float:
        calls.append(name)
        return float(number)

    sides = {name: lambda number, name=name: side(name, number) for name in "abc"}
    found = take_turns(sides, rounds=2, warmups=1, pause_s=0.0)
    short = take_turns(sides, rounds=50, warmups=1, budget_s=0.0, at_least=4, pause_s=0.0)

    assert "".join(calls[:9]) == "abcbcacab"
    assert found == {"a": [1.0, 2.0], "b": [1.0, 2.0], "c": [1.0, 2.0]}
    assert len(short["a"]) == 4


def test_tokens_behind_a_difference_do_not_count() -> None:
    """After one other token an output goes on from another text."""
    found = Agreement.of([[1, 2, 3], [1, 9, 9]], [[1, 2, 3], [1, 2, 3]])

    assert found == Agreement(num_equal=4, num_compared=5)


# --- llama.cpp's state ---------------------------------------------------------------------------


def state_of(
    rows: Sequence[bytes], *, header: bytes = b"", stream: int = 0, num_streams: int = 1
) -> bytes:
    """A state of one layer whose keys and values have these rows."""
    content = header + struct.pack("<I", num_streams) + struct.pack("<I", 0) * stream
    content += struct.pack("<I", len(rows))
    content += b"".join(struct.pack("<iIi", at, 1, 5) for at in range(len(rows)))
    content += struct.pack("<II", 0, 1)
    for _ in range(2):
        content += struct.pack("<iQ", 1, len(rows[0])) + b"".join(rows)
    return content + struct.pack("<I", 0) * (num_streams - stream - 1)


@pytest.mark.parametrize("header", [b"", struct.pack("<Ii", 0xAF143CD8, 5)], ids=["old", "new"])
@pytest.mark.parametrize(("stream", "num_streams"), [(0, 1), (2, 4)])
def test_a_state_grows_by_repeating_its_rows(header: bytes, stream: int, num_streams: int) -> None:
    """Positions go on, rows come again, and other streams stay empty."""
    rows, longer = [b"abcd", b"efgh", b"ijkl"], [b"abcd", b"efgh", b"ijkl", b"abcd", b"efgh"]

    def content(rows: Sequence[bytes]) -> bytes:
        return state_of(rows, header=header, stream=stream, num_streams=num_streams)

    grown = b"".join(parse_state(content(rows)).grown(5))

    assert grown == content(longer)


@pytest.mark.parametrize("damage", ["cut", "longer", "transposed", "positions"])
def test_a_state_of_another_form_is_refused(damage: str) -> None:
    """What is not understood to the last byte is not put into an engine."""
    content = bytearray(state_of([b"abcd", b"efgh"]))
    match damage:
        case "cut":
            del content[-1]
        case "longer":
            content += b"\0"
        case "transposed":
            content[8 + 24] = 1
        case _:
            content[8] = 9
    with pytest.raises(StateFormatError):
        parse_state(bytes(content))
