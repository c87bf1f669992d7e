"""The board in docs/grafana beside a real server: after some traffic every panel has what it asks for."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.running_server import RunningServer, running_server
from tests.unit.test_metrics_board import board

_SELECTOR = re.compile(r"\b(kvkeep_\w+)\{([^}]*)\}")
_MATCHER = re.compile(r'(\w+)(=~|!=|=)"([^"]*)"')
_GROUPING = re.compile(r"\bby \(([^)]*)\)")
_LEGEND = re.compile(r"\{\{(\w+)\}\}")
# Of the scraper, not of the server.
_TARGET_LABELS = {"instance", "job"}
# What healthy traffic has nothing of.
_TROUBLE = {
    "kvkeep_load_failures_total",
    "kvkeep_evictions_total",
    "kvkeep_planner_decisions_total",
}

Labels = dict[str, dict[str, set[str]]]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Labels:
    """By name of a sample: its labels, and their values."""
    folder = tmp_path_factory.mktemp("disk")
    with running_server(tiers=["host:16MB", f"disk:{folder}:64MB"]) as server:
        text = _after_traffic(server)
    found: Labels = defaultdict(lambda: defaultdict(set))
    for family in parse_text(text):
        for sample in family.samples:
            found[sample.name].update()
            for label, value in sample.labels.items():
                found[sample.name][label].add(value)
    return found


def _after_traffic(server: RunningServer) -> str:
    """What a server shows behind answers, streams, a miss, a refusal, a purge, and loads from a tier."""
    with server.client() as client:
        for number in (0, 0, 1):
            prompt = f"{number} amber river: 4821, silver fox: 1177\n" * 20
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "stream": number == 1}
            body["kv_cache"] = {"session": "board", "tags": ["t"], "explain": True}
            assert client.post("/v1/completions", json=body).status_code == 200
        assert client.post("/v1/completions", json={"max_tokens": -1}).status_code == 400
        assert client.post("/v1/cache/purge", json={"tags": ["t"]}).json()["deleted"] > 0
        assert client.post("/v1/completions", json=body | {"stream": False}).status_code == 200
        return client.get("/metrics").text


def _queries() -> Iterator[tuple[str, str, str]]:
    for panel in board()["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"], target["legendFormat"]


def test_every_metric_of_the_board_is_shown(shown: Labels) -> None:
    """With samples, but for what only goes wrong."""
    asked = {name for _, expr, _ in _queries() for name, _ in _SELECTOR.findall(expr)}

    assert len(asked) > 20
    assert asked - set(shown) <= _TROUBLE


def test_labels_and_values_of_the_board_are_those_of_the_server(shown: Labels) -> None:
    """Selectors, groupings and legends; a value that is matched exactly is one that comes."""
    num_checked = 0
    for title, expr, legend in _queries():
        known: set[str] = set()
        names = [name for name, _ in _SELECTOR.findall(expr)]
        for name, matchers in _SELECTOR.findall(expr):
            known |= set(shown.get(name, {}))
            for label, operator, value in _MATCHER.findall(matchers):
                if label in _TARGET_LABELS or name not in shown:
                    continue
                assert label in shown[name], (title, name, label)
                if operator != "=~":
                    assert value in shown[name][label], (title, name, label, value)
                num_checked += 1
        if not any(name in _TROUBLE for name in names):
            grouped = {one.strip() for group in _GROUPING.findall(expr) for one in group.split(",")}
            assert grouped | set(_LEGEND.findall(legend)) <= known, title
    assert num_checked > 5


def test_every_query_is_promql() -> None:
    """Read by a parser of the language, with what Grafana puts in for its variables."""
    parser = pytest.importorskip("promql_parser", reason="promql-parser is not installed")

    for title, expr, _ in _queries():
        query = expr.replace("$__rate_interval", "5m").replace("$instance", ".*")
        assert parser.parse(query) is not None, title
    with pytest.raises(ValueError, match="unclosed"):
        parser.parse("sum by (a (x)")


def test_the_list_of_servers_is_one_that_a_server_fills(shown: Labels) -> None:
    """The variable of the board asks for a label of a metric that every server shows."""
    (variable,) = [one for one in board()["templating"]["list"] if one["name"] == "instance"]
    metric, label = re.findall(r"label_values\((\w+), (\w+)\)", json.dumps(variable["query"]))[0]

    assert metric in shown
    assert label in _TARGET_LABELS
