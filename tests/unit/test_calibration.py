"""What was learnt is there at the next start, and what cannot be trusted is as if it were not."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvkeep.planning.calibration import (
    Calibration,
    calibration_path,
    load_calibration,
    machine_id,
    measure_compute,
    save_calibration,
)
from kvkeep.planning.cost import ComputeCost, LoadCost
from kvkeep.spec import Span

LEARNT = Calibration(
    compute=ComputeCost(fixed_s=0.004, linear_s=2e-5, quadratic_s=3e-9),
    loads={"host": LoadCost(latency_s=1e-4, bytes_per_s=5e9)},
)
NOW = 1_800_000_000.0
DAY_S = 24 * 3600.0


def now() -> float:
    """A clock that stands still."""
    return NOW


def save(folder: Path, **changes: Any) -> Path:
    """A file that is right but for `changes`."""
    assert save_calibration(folder, "model", "machine", LEARNT, clock=now)
    path = calibration_path(folder, "model", "machine")
    document = json.loads(path.read_text())
    document.update(changes)
    path.write_text(json.dumps(document))
    return path


def found(folder: Path, age_s: float = 0.0) -> Calibration | None:
    """What is loaded so many seconds later."""
    return load_calibration(folder, "model", "machine", clock=lambda: NOW + age_s)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    """Into a folder that did not exist; the last one counts."""
    folder = tmp_path / "a" / "b"
    other = replace(LEARNT, loads={})

    assert found(folder) is None
    assert save_calibration(folder, "model", "machine", other, clock=now)
    assert save_calibration(folder, "model", "machine", LEARNT, clock=now)

    assert found(folder) == LEARNT
    assert len(list(folder.iterdir())) == 1


def test_models_and_machines_do_not_share(tmp_path: Path) -> None:
    """Each pair has a file of its own, and a file that was copied over is not believed."""
    save(tmp_path)

    for model, machine in (("other", "machine"), ("model", "other"), ("modelm", "achine")):
        assert load_calibration(tmp_path, model, machine, clock=now) is None
    calibration_path(tmp_path, "model", "machine").rename(calibration_path(tmp_path, "other", "x"))
    assert load_calibration(tmp_path, "other", "x", clock=now) is None


@pytest.mark.parametrize(
    ("age_s", "is_used"),
    [(0, True), (29 * DAY_S, True), (31 * DAY_S, False), (-600, True), (-DAY_S, False)],
)
def test_what_is_old_or_from_the_future_is_not_used(
    tmp_path: Path, age_s: float, *, is_used: bool
) -> None:
    """Drivers, libraries and clocks change."""
    save(tmp_path)

    assert (found(tmp_path, age_s) is not None) == is_used


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"version": None},
        {"saved_at": "today"},
        {"model": "another"},
        {"compute": {"fixed_s": -1.0, "linear_s": 1.0, "quadratic_s": 1.0}},
        {"compute": {"fixed_s": 1.0, "linear_s": 1.0}},
        {"compute": {"fixed_s": 1.0, "linear_s": 1.0, "quadratic_s": 1.0, "cubic_s": 1.0}},
        {"compute": {"fixed_s": "1", "linear_s": 1.0, "quadratic_s": 1.0}},
        {"compute": {"fixed_s": True, "linear_s": 1.0, "quadratic_s": 1.0}},
        {"compute": {"fixed_s": float("nan"), "linear_s": 1.0, "quadratic_s": 1.0}},
        {"compute": {"fixed_s": float("inf"), "linear_s": 1.0, "quadratic_s": 1.0}},
        {"compute": []},
        {"compute": None},
        {"loads": {"host": {"latency_s": 0.0, "bytes_per_s": 0.0}}},
        {"loads": {"host": 5}},
        {"loads": []},
    ],
)
def test_values_that_cannot_be_are_not_used(tmp_path: Path, changes: dict[str, Any]) -> None:
    """One of them, and nothing of the file is believed."""
    save(tmp_path, **changes)

    assert found(tmp_path) is None
    save(tmp_path)
    assert found(tmp_path) == LEARNT


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"3", b"[]", b"[" * 100_000])
def test_a_damaged_file_is_not_used(tmp_path: Path, content: bytes) -> None:
    """And the next save mends it."""
    path = save(tmp_path)
    path.write_bytes(content)

    assert found(tmp_path) is None
    save(tmp_path)
    assert found(tmp_path) == LEARNT


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    """Half a file is no file."""
    path = save(tmp_path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert found(tmp_path) is None


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    """Memory is not taken for what cannot be ours."""
    path = save(tmp_path)
    with path.open("ab") as file:
        file.write(b" " * (1 << 20))

    assert found(tmp_path) is None


def test_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The next start is a cold one, and the log says why."""
    (tmp_path / "file").write_text("")

    assert not save_calibration(tmp_path / "file", "model", "machine", LEARNT)
    assert "calibration is not kept" in caplog.text
    assert found(tmp_path / "file") is None


def test_a_save_that_fails_half_way_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no temporary file."""
    save(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    monkeypatch.setattr(Path, "replace", fail)

    assert not save_calibration(tmp_path, "model", "machine", replace(LEARNT, loads={}))
    assert found(tmp_path) == LEARNT
    assert len(list(tmp_path.iterdir())) == 1


def test_a_machine_is_known_by_its_processor_and_cores() -> None:
    """The same every time, and different for a process that may use fewer cores."""
    name = machine_id()
    assert name == machine_id()
    assert name.endswith(" cores")
    cores = os.sched_getaffinity(0)
    if len(cores) > 1:
        os.sched_setaffinity(0, {min(cores)})
        try:
            assert machine_id() != name
        finally:
            os.sched_setaffinity(0, cores)


@pytest.mark.parametrize("most_tokens", [1, 5, 100, 4096])
def test_a_short_measurement_finds_the_cost(most_tokens: int) -> None:
    """From a few steps, of which the first of each size is a warm-up."""
    true, seen = LEARNT.compute, list[Span]()

    def run(span: Span) -> float:
        is_first = span not in seen
        seen.append(span)
        return true.seconds([span]) * (3 if is_first else 1)

    guess = ComputeCost(fixed_s=0.001, linear_s=1e-4, quadratic_s=1e-9)
    cost = measure_compute(run, most_tokens=most_tokens, guess=guess, rounds=1)

    assert len(seen) <= 12
    assert all(0 <= span.start < span.stop <= most_tokens for span in seen)
    for span in (Span(0, 1), Span(0, most_tokens), Span(most_tokens // 2, most_tokens)):
        if len(span):
            assert cost.seconds([span]) == pytest.approx(true.seconds([span]), rel=0.1)
