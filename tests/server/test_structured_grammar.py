"""The sampler chooses only what a grammar lets, and grammars of the optional library say what that is."""

import json
import sys
from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field

from kvkeep.config import SamplingParams
from kvkeep.config.grammar import TokenMatcher
from kvkeep.engine.sampler import InvalidLogitsError, Sampler, SampleRow
from kvkeep.errors import ConfigError, RequestError
from kvkeep.hf.load import LoadedModel, load_model
from kvkeep.server.structured import AnswerForm, Grammars

_VOCABULARY = 20


class _Steps:
    """Lets come, token by token, the ids of `steps`; behind the last one nothing."""

    def __init__(self, *steps: set[int]) -> None:
        self.steps = steps

    def matcher(self) -> TokenMatcher:
        return _StepMatcher(self.steps)


class _StepMatcher:
    failure = None

    def __init__(self, steps: Sequence[set[int]]) -> None:
        self._steps = steps
        self._at = 0

    def accept(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            assert token_id in self._steps[self._at]
            self._at += 1

    def allowed(self) -> bytes:
        ids = self._steps[self._at] if self._at < len(self._steps) else set()
        bits = sum(1 << token_id for token_id in ids)
        return bits.to_bytes(2, "little")  # of 20 tokens the last four are never known


def _row(output: list[int], **params: object) -> SampleRow:
    return SampleRow.start(SamplingParams(**params), [1], output)  # type: ignore[arg-type]


def test_only_what_the_grammar_lets_is_chosen() -> None:
    """Greedy and random rows follow their grammars; a row without one is free."""
    logits_BV = torch.arange(float(_VOCABULARY)).repeat(3, 1)
    outputs: list[list[int]] = [[], [], []]
    rows = [
        _row(outputs[0], temperature=0, grammar=_Steps({3, 5}, {4}, {5, 6})),
        _row(outputs[1], temperature=5.0, seed=1, grammar=_Steps({7, 9}, {2, 11}, {1})),
        _row(outputs[2], temperature=0),
    ]

    for _ in range(3):
        for one, output in zip(Sampler().sample(logits_BV, rows), outputs, strict=True):
            output.append(one.token_id)

    assert outputs[0] == [5, 4, 6]
    assert outputs[1][0] in {7, 9}
    assert outputs[1][1] in {2, 11}
    assert outputs[1][2] == 1
    assert outputs[2] == [19, 19, 19]
    assert torch.equal(logits_BV, torch.arange(float(_VOCABULARY)).repeat(3, 1))


def test_a_lost_step_does_not_advance_the_grammar() -> None:
    """What was sampled but never appended to the output was never said."""
    output: list[int] = []
    row = _row(output, temperature=0, grammar=_Steps({3}, {4}))
    logits_BV = torch.zeros(1, _VOCABULARY)

    first = [Sampler().sample(logits_BV, [row])[0].token_id for _ in range(2)]

    assert first == [3, 3]


def test_a_grammar_without_a_next_token_ends_its_own_row_only() -> None:
    """The row is named as one without a distribution, as any other such row is."""
    rows = [_row([], temperature=0, grammar=_Steps()), _row([], temperature=0)]

    with pytest.raises(InvalidLogitsError) as caught:
        Sampler().sample(torch.zeros(2, _VOCABULARY), rows)

    assert caught.value.rows == (0,)


def test_biases_move_logits_and_reports_stay_the_models_own() -> None:
    """A biased token is chosen with the model's own probability; ids it does not know do nothing."""
    logits_BV = torch.zeros(1, _VOCABULARY)
    row = _row([], temperature=0, logit_bias={6: 3.0, 7: -1, 500: 100}, logprobs=1)

    (found,) = Sampler().sample(logits_BV, [row])

    assert found.token_id == 6
    assert found.logprob == pytest.approx(-torch.tensor(20.0).log().item())


@pytest.mark.parametrize(
    ("params", "word"),
    [
        ({"logit_bias": {5: 101}}, "out of range"),
        ({"logit_bias": {-1: 1}}, "out of range"),
        ({"logit_bias": [5]}, "no mapping"),
        ({"grammar": _Steps(), "ignore_eos": True}, "lets no grammar end"),
    ],
)
def test_impossible_settings_are_refused(params: dict[str, object], word: str) -> None:
    """Named before anything is computed."""
    with pytest.raises(ConfigError, match=word):
        SamplingParams(**params)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """The bundled model, for its tokenizer."""
    return load_model("tiny")


@pytest.fixture(scope="module")
def grammars(loaded: LoadedModel) -> Grammars:
    """Its grammars; skipped where the library is absent."""
    pytest.importorskip("llguidance")
    return Grammars(
        loaded.tokenizer, vocab_size=loaded.model.config.vocab_size, eos_ids=loaded.eos_ids
    )


def _spoken(loaded: LoadedModel, matcher: TokenMatcher, seed: int, most: int = 400) -> str:
    """Text of a speaker that says anything the grammar lets; it must come to an end."""
    generator = torch.Generator().manual_seed(seed)
    num_vocabulary = loaded.model.config.vocab_size
    said: list[int] = []
    assert loaded.tokenizer is not None
    for _ in range(most):
        bits = int.from_bytes(matcher.allowed(), "little")
        noise = torch.rand(num_vocabulary, generator=generator)
        ids = [token for token in range(num_vocabulary) if bits >> token & 1]
        assert ids, "the grammar must let something come"
        ends = loaded.eos_ids.intersection(ids)
        if ends:
            return str(loaded.tokenizer.decode(said))
        said.append(max(ids, key=lambda token: float(noise[token])))
        matcher.accept(said[-1:])
    raise AssertionError("the grammar lets the output go on for ever")


class Pet(BaseModel):
    """Part of an answer, which the schema of the whole refers to."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["cat", "dog"]


class Person(BaseModel):
    """An answer."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)
    pets: list[Pet] = Field(max_length=2)


_SCHEMA = Person.model_json_schema()


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_said_matches_the_schema(
    loaded: LoadedModel, grammars: Grammars, seed: int
) -> None:
    """Random tokens under the grammar are JSON of the schema, laid out as json.dumps does."""
    grammar = grammars.compile(AnswerForm(field="response_format", schema=_SCHEMA))

    text = _spoken(loaded, grammar.matcher(), seed)

    Person.model_validate_json(text)
    assert text.startswith('{"name": "')
    assert ', "age": ' in text


@pytest.mark.parametrize("seed", range(3))
def test_calls_name_a_tool_and_match_its_parameters(
    loaded: LoadedModel, grammars: Grammars, seed: int
) -> None:
    """One call, of one of the tools, with references inside the parameters resolved."""
    form = AnswerForm(
        field="tools", calls={"register": _SCHEMA, 'ask "x"': _SCHEMA}, is_one_call=True
    )

    text = _spoken(loaded, grammars.compile(form).matcher(), seed)

    assert text.startswith('<tool_call>\n{"name": "')
    assert text.endswith("}\n</tool_call>")
    call = json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    assert call["name"] in {"register", 'ask "x"'}
    Person.model_validate(call["arguments"])


def test_what_must_come_is_written_as_a_tokenizer_would(
    loaded: LoadedModel, grammars: Grammars
) -> None:
    """A call without any choice has one way to be said: sent back, it is made of the same tokens."""
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    form = AnswerForm(field="tools", calls={"clock": nothing}, is_one_call=True)
    expected = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    assert loaded.tokenizer is not None
    matcher = grammars.compile(form).matcher()

    for token_id in loaded.tokenizer.encode(expected)[:-1]:
        assert matcher.allowed() == (1 << token_id).to_bytes(len(matcher.allowed()), "little")
        matcher.accept([token_id])


def test_outputs_of_one_grammar_do_not_disturb_each_other(
    loaded: LoadedModel, grammars: Grammars
) -> None:
    """Each has a matcher of its own, and a grammar is compiled once."""
    form = AnswerForm(field="response_format", schema=_SCHEMA)
    grammar = grammars.compile(form)
    one, two = grammar.matcher(), grammar.matcher()

    before = two.allowed()
    assert loaded.tokenizer is not None
    one.accept(loaded.tokenizer.encode('{"name": "'))

    assert one.allowed() != before
    assert two.allowed() == before
    assert grammars.compile(form) is grammar


def test_a_token_that_is_not_allowed_leaves_nothing_to_say(
    loaded: LoadedModel, grammars: Grammars
) -> None:
    """A matcher that lost its output lets nothing come, instead of anything."""
    matcher = grammars.compile(AnswerForm(field="f", schema=_SCHEMA)).matcher()
    assert loaded.tokenizer is not None

    matcher.accept(loaded.tokenizer.encode("no JSON"))

    assert not any(matcher.allowed())


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "wizard"},
        {"$ref": "#/$defs/missing"},
        {"allOf": [{"$ref": "#"}]},
        {"type": "object", "properties": 5},
        {"type": "string", "pattern": "("},
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused(
    grammars: Grammars, schema: dict[str, object]
) -> None:
    """By the name of its field, with the library's reason in one line."""
    with pytest.raises(RequestError, match=r"^response_format cannot be followed: ") as caught:
        grammars.compile(AnswerForm(field="response_format", schema=schema))

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "string", "allOf": [{"pattern": f"^(x|aa.*a.{{{n}}}b.*)$"} for n in range(1, 40)]},
        {
            "$defs": {str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(3000)} | {"3000": {}},
            "$ref": "#/$defs/0",
        },
    ],
)
def test_parameters_that_would_hold_up_or_end_the_server_are_refused(
    grammars: Grammars, parameters: dict[str, object]
) -> None:
    """Of each tool, not only of the first: at a later token, or with more references than a stack holds."""
    form = AnswerForm(field="tools", calls={"fine": _SCHEMA, "bad": parameters})

    with pytest.raises(RequestError, match=r"^tools (has 39 patterns|cannot be followed: making)"):
        grammars.compile(form)


def test_a_matcher_that_met_a_limit_says_which(loaded: LoadedModel, grammars: Grammars) -> None:
    """As long as it has not, it has no failure."""
    wide = {f"property_{number}": {"type": "integer"} for number in range(2500)}
    schema = {"type": "object", "properties": wide}
    assert loaded.tokenizer is not None
    matcher = grammars.compile(AnswerForm(field="f", schema=schema)).matcher()
    assert not matcher.failure

    matcher.accept(loaded.tokenizer.encode('{"'))

    assert not any(matcher.allowed())
    assert matcher.failure is not None
    assert "max is 8000" in matcher.failure


def test_without_the_library_the_extra_is_named(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An import that fails says what to install; a later one, when it is there, works."""
    monkeypatch.setitem(sys.modules, "llguidance", None)
    grammars = Grammars(
        loaded.tokenizer, vocab_size=loaded.model.config.vocab_size, eos_ids=loaded.eos_ids
    )

    with pytest.raises(ConfigError, match=r"pip install 'kvkeep\[grammar\]'"):
        grammars.compile(AnswerForm(field="response_format", schema=_SCHEMA))
