"""Grammars are tried in a process of their own, which a bad one ends."""

import gc
import json
import os
import signal
from typing import Any

import pytest

from kvkeep.server.grammar_trial import GrammarTrial

pytest.importorskip("llguidance")

_DEEP = 3000
_GOOD = {"type": "object", "properties": {"z": {"type": "integer"}}}


def _grammar(schema: dict[str, Any]) -> str:
    return f"start: json\njson: %json {json.dumps(schema)}"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "allOf": [{"pattern": f".*a.{{{n}}}b.*"} for n in range(1, 40)]},
        {
            "$defs": {str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(_DEEP)}
            | {str(_DEEP): {}},
            "$ref": "#/$defs/0",
        },
    ],
)
def test_a_grammar_that_takes_too_much_is_refused_and_the_next_is_tried(
    schema: dict[str, Any],
) -> None:
    """Time, memory and stack of the process have an end, and another process takes its place."""
    trial = GrammarTrial({}, max_work_s=0.5)

    failure = trial.failure(_grammar(schema))

    assert failure is not None
    assert "takes more than 0.5 s, 1024 MiB or the stack" in failure
    assert trial.failure(_grammar(_GOOD)) is None


def test_an_error_of_the_library_is_told() -> None:
    """Also one that only shows beside a vocabulary, and one of the limits that were given."""
    trial = GrammarTrial({"max_grammar_size": 1000})
    wide = {"properties": {f"p{number}": _GOOD for number in range(300)}}

    assert "Invalid type: wizard" in (trial.failure(_grammar({"type": "wizard"})) or "")
    assert trial.failure(_grammar({"type": "integer", "multipleOf": 999999937, "minimum": 5}))
    assert "limit for this grammar: 1000" in (trial.failure(_grammar(wide)) or "")
    assert trial.failure(_grammar({"type": "integer"})) is None


def test_a_process_that_was_ended_is_replaced() -> None:
    """By whomever; the grammar that comes next is not blamed for it."""
    trial = GrammarTrial({})
    assert trial.failure(_grammar(_GOOD)) is None
    assert trial._process is not None
    os.kill(trial._process.pid, signal.SIGKILL)
    trial._process.wait()

    assert trial.failure(_grammar(_GOOD)) is None


def test_the_process_ends_with_what_it_belongs_to() -> None:
    """Nothing is left of it."""
    trial = GrammarTrial({})
    assert trial.failure(_grammar(_GOOD)) is None
    process = trial._process
    assert process is not None

    del trial
    gc.collect()

    assert process.returncode is not None
