"""Requests made from the served OpenAPI document, in great variety: none brings a fault of the server's."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error

from tests.running_server import RunningServer, running_server

_NUM_EXAMPLES = 20
_TIMEOUT_S = 30.0
# Of a body with all its fields, nearly always one is refused before the others are looked at.
_MAX_OPTIONAL_FIELDS = 3

Json = dict[str, Any]


@pytest.fixture(scope="module")
def served() -> Iterator[RunningServer]:
    """A server that knows every model, and whose requests end soon."""
    with running_server(
        request_timeout_s=1.0, max_prompt_tokens=2000, model_names=["*"]
    ) as running:
        yield running


def test_no_request_is_a_fault_of_the_server(served: RunningServer) -> None:
    """Whatever the document allows, and what it does not, is answered with less than 500."""
    with served.client() as client:
        document: Json = client.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.base_url = served.url
    # Events are a stream without end.
    described = schema.exclude(path_regex="/events$").get_all_operations()
    operations = [one.ok() for one in described]  # type: ignore[union-attr]  # all are well described
    statuses: Counter[int] = Counter()

    for operation in operations:
        _try(operation, _needed_fields(document, operation.path, operation.method), statuses)

    assert len(operations) > 8
    assert statuses[200] > 50, "hardly anything was served, so hardly anything was tested"
    with served.client() as client:
        assert client.get("/health").json() == {"status": "ok"}


def _try(
    operation: Any,  # noqa: ANN401  of a library that leaves it generic
    needed: frozenset[str],
    statuses: Counter[int],
) -> None:
    @given(case=operation.as_strategy(), choice=st.data())
    @settings(
        max_examples=_NUM_EXAMPLES,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    def ask(case: schemathesis.Case[Any], choice: st.DataObject) -> None:
        if isinstance(case.body, dict) and choice.draw(st.booleans()):
            optional = st.sampled_from(sorted(case.body) or ["none"])
            kept = needed | choice.draw(st.sets(optional, max_size=_MAX_OPTIONAL_FIELDS))
            case.body = {name: value for name, value in case.body.items() if name in kept}
        response = case.call(timeout=_TIMEOUT_S)
        statuses[response.status_code] += 1
        if response.status_code == 504:
            # More tokens were asked for than there is time, and that is what it was told to say.
            assert "request_timeout_s" in response.text
            return
        case.validate_response(response, checks=[not_a_server_error])

    ask()


def _needed_fields(document: Mapping[str, Any], path: str, method: str) -> frozenset[str]:
    """The fields that a body must have."""
    body = document["paths"][path][method].get("requestBody", {})
    reference: str = (
        body.get("content", {}).get("application/json", {}).get("schema", {}).get("$ref", "")
    )
    schema = document["components"]["schemas"].get(reference.rpartition("/")[2], {})
    return frozenset(schema.get("required", ()))
