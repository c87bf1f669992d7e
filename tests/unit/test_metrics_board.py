"""The board in docs/grafana asks for nothing that a server does not show, and docs/metrics.md names all."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvkeep.metrics import Metrics, Snapshot
from kvkeep.planning import PlannerStats
from tests.cache_stats import STATS

DOCS = Path(__file__).parents[2] / "docs"
_NAME = re.compile(r"\bkvkeep_[a-z_]+")
_SUFFIX = re.compile(r"_(bucket|count|sum)$")


def board() -> dict[str, Any]:
    """The board as Grafana imports it."""
    parsed = json.loads((DOCS / "grafana" / "kvkeep.json").read_text(encoding="utf-8"))
    assert isinstance(parsed, dict)
    return parsed


def shown_names() -> set[str]:
    """The families that a server with tiers shows."""
    planner = PlannerStats(
        num_decisions={}, num_finished=0, predicted_s=0.0, actual_s=0.0, mean_error=None
    )
    snapshot = Snapshot(
        is_healthy=True, num_running=0, num_waiting=0, cache=replace(STATS, planner=planner)
    )
    lines = Metrics(model="toy", version="1").render(snapshot).decode().splitlines()
    return {line.split()[2] for line in lines if line.startswith("# TYPE ")}


def test_every_query_of_the_board_finds_something() -> None:
    """A name that is renamed has to be renamed there."""
    queries = [target["expr"] for panel in board()["panels"] for target in panel.get("targets", [])]
    names = {_SUFFIX.sub("", name) for query in queries for name in _NAME.findall(query)}

    assert len(queries) > 20
    assert names - shown_names() == set()


def test_the_board_can_be_imported_anywhere() -> None:
    """The data source and the server are variables; panels have their own ids and do not overlap."""
    panels = board()["panels"]
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]

    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) == 23
    assert [one["name"] for one in board()["templating"]["list"]] == ["datasource", "instance"]
    for panel in panels:
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == "${datasource}"
            assert 'instance=~"$instance"' in target["expr"]


def test_the_page_on_metrics_names_every_family() -> None:
    """No more and no less than what a server shows."""
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `kvkeep_")]
    documented = [name for row in rows for name in _NAME.findall(row.split("|")[1])]

    assert len(documented) == len(set(documented))
    assert set(documented) == shown_names()
