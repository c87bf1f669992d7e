"""Outputs of a required form: JSON of a schema, or calls of tools, by the optional library llguidance.

The grammar lets JSON have one layout, that of Python's json.dumps. A client that sends the answer back then
gets the same tokens again, and with them the cache.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

from kvkeep.config.grammar import Grammar
from kvkeep.errors import ConfigError, RequestError
from kvkeep.server.call_syntax import CallSyntax, HermesSyntax
from kvkeep.server.grammar_trial import GrammarTrial
from kvkeep.server.string_rules import check_string_rules

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["AnswerForm", "Grammars"]

_MAX_KEPT = 64
# Compiling takes time that grows with the square of the schemas: about a second for so much.
_MAX_CHARACTERS = 2**17
_MAX_REASON = 300
# 1,500 optional properties need 6,000 items; a state, of which each output has its own, about 2 KB.
_LIMITS: dict[str, Any] = {
    "max_items_in_row": 8_000,
    "max_lexer_states": 100_000,
    "verbose_errors": False,
}
# What the library writes in place of that state.
_NO_STATE = "<non-verbose/>"
_NO_TEXT = "no text is of this form"
# Where in the grammar that is made here; a client has never seen it.
_PLACE = re.compile(r"^at \d+\(\d+\): ")
_LAYOUT: dict[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerForm:
    """What an output has to be: JSON of `schema`, or calls of functions with these parameters, by name.

    With both it may be either. `is_one_call`: not more than one. `field` is what errors speak of.
    """

    field: str
    schema: Mapping[str, Any] | None = None
    calls: Mapping[str, Mapping[str, Any]] | None = None
    is_one_call: bool = False

    def schemas(self) -> list[Mapping[str, Any]]:
        """All schemas of this form."""
        return [*([] if self.schema is None else [self.schema]), *(self.calls or {}).values()]


class Grammars:
    """Compiles grammars for one tokenizer and keeps the last ones. Thread-safe; nothing is loaded before use.

    `tokenizer` is one of transformers; `vocab_size` the number of logits; `eos_ids` the tokens that end an
    output; `syntax` is how the model writes calls.
    """

    def __init__(
        self,
        tokenizer: object,
        *,
        vocab_size: int,
        eos_ids: Collection[int],
        syntax: CallSyntax | None = None,
    ) -> None:
        self._tokenizer: Any = tokenizer  # any: transformers leaves parts of it without types
        self._syntax = syntax or HermesSyntax()
        self._vocab_size = vocab_size
        self._eos_ids = sorted(eos_ids)
        self._lock = Lock()
        self._vocabulary: LLTokenizer | None = None
        self._trial = GrammarTrial(_LIMITS)
        self._source_to_grammar: OrderedDict[str, Grammar] = OrderedDict()

    def compile(self, form: AnswerForm) -> Grammar:
        """The grammar of outputs of this form. Raises RequestError for one that cannot be followed."""
        source = self._source(form)
        found = self._find(source)
        if found is not None:
            return found
        # Without the lock: this may take a second, and others look for what there is.
        self._try(form)
        grammar = self._compiled(source, form.field)
        with self._lock:
            self._source_to_grammar[source] = grammar
            if len(self._source_to_grammar) > _MAX_KEPT:
                self._source_to_grammar.popitem(last=False)
        return grammar

    def kept(self, form: AnswerForm) -> Grammar | None:
        """The grammar if it has been compiled before; quick. Raises RequestError for too big a form."""
        return self._find(self._source(form))

    def _find(self, source: str) -> Grammar | None:
        with self._lock:
            if source not in self._source_to_grammar:
                return None
            self._source_to_grammar.move_to_end(source)
            return self._source_to_grammar[source]

    def _source(self, form: AnswerForm) -> str:
        starts, rules = [], []
        if form.schema is not None:
            starts.append("json")
            rules.append(_rule("json", form.schema))
        if form.calls:
            starts.append("calls")
            rules += self._call_rules(form.calls, is_one=form.is_one_call)
        source = "\n".join(["start: " + " | ".join(starts), *rules])
        if len(source) > _MAX_CHARACTERS:
            raise RequestError(
                f"{form.field} has schemas of {len(source)} characters; give at most {_MAX_CHARACTERS}"
            )
        return source

    def _call_rules(
        self, name_to_schema: Mapping[str, Mapping[str, Any]], *, is_one: bool
    ) -> list[str]:
        first, last = map(self._written, self._syntax.around)
        between = self._syntax.between
        more = "" if is_one or between is None else f"({self._written(between)} call)*"
        numbers = range(len(name_to_schema))
        rules = [
            f"calls: {first} call {more} {last}",
            "call: " + " | ".join(f"call_{number}" for number in numbers),
        ]
        for number, (name, schema) in enumerate(name_to_schema.items()):
            # The parameters are a document of their own, in which references are found.
            opening, closing = map(self._written, self._syntax.around_arguments(name))
            rules.append(f"call_{number}: {opening} json_{number} {closing}")
            rules.append(_rule(f"json_{number}", schema))
        return rules

    def _try(self, form: AnswerForm) -> None:
        """Raise RequestError for schemas that would hold up or end the server, now or at a later token."""
        with self._lock:
            self._loaded()
        schemas = form.schemas()
        for schema in schemas:
            check_string_rules(form.field, schema)
        names = [f"json_{number}" for number in range(len(schemas))]
        # Without what a call has around them, which may be tokens of this vocabulary.
        source = "\n".join(["start: " + " | ".join(names), *map(_rule, names, schemas)])
        failure = self._trial.failure(source)
        if failure is not None:
            raise RequestError(f"{form.field} cannot be followed: {_reason(failure)}")

    def _compiled(self, source: str, field: str) -> Grammar:
        with self._lock:
            vocabulary = self._loaded()
        from llguidance import LLMatcher, LLParserLimits  # absent where the extra is

        limits = LLParserLimits(**_LIMITS)
        grammar = _Compiled(LLMatcher(vocabulary, source, log_level=0, limits=limits))
        _check_beginning(grammar.matcher(), field)
        return grammar

    def _written(self, texts: Sequence[str]) -> str:
        with self._lock:
            return " ".join(map(self._mark, texts))

    def _mark(self, text: str) -> str:
        """`text` in a grammar: a token of its own where the vocabulary has one that is no ordinary text."""
        vocabulary = self._loaded()
        token_id = self._tokenizer.convert_tokens_to_ids(text)
        is_token = isinstance(token_id, int) and token_id != self._tokenizer.unk_token_id
        is_special = is_token and vocabulary.is_special_token(token_id)
        return f"<[{token_id}]>" if is_special else json.dumps(text)

    def _loaded(self) -> "LLTokenizer":
        if self._vocabulary is None:
            self._vocabulary = _vocabulary(self._tokenizer, self._vocab_size, self._eos_ids)
        return self._vocabulary


class _Compiled:
    """A compiled grammar: its matcher at the start, which is copied for every output."""

    def __init__(self, start: "LLMatcher") -> None:
        self._start = start
        self._num_bytes = len(start.deep_copy().compute_bitmask())

    def matcher(self) -> "_Matcher":
        return _Matcher(self._start.deep_copy(), self._num_bytes)


class _Matcher:
    """Follows one output."""

    def __init__(self, matcher: "LLMatcher", num_bytes: int) -> None:
        self._matcher = matcher
        self._num_bytes = num_bytes

    @property
    def failure(self) -> str | None:
        return _reason(self._matcher.get_error()) if self._matcher.is_error() else None

    def accept(self, token_ids: Sequence[int]) -> None:
        if token_ids:
            # One that is not allowed puts it into a state in which nothing is.
            self._matcher.consume_tokens(list(token_ids))

    def allowed(self) -> bytes:
        if self._matcher.is_error():
            return bytes(self._num_bytes)
        mask = self._matcher.compute_bitmask()
        return bytes(self._num_bytes) if self._matcher.is_error() else mask

    def forced(self) -> list[int]:
        """The tokens that are the only way to go on."""
        return [] if self._matcher.is_error() else list(self._matcher.compute_ff_tokens())


def _check_beginning(matcher: _Matcher, field: str) -> None:
    """Raise RequestError where an output cannot begin."""
    mask = matcher.allowed()
    # A schema that only refers to itself is well formed, and nothing can begin as it says.
    is_dead = not any(mask)
    if matcher.failure is None and not is_dead:
        # Behind what every output begins with is the first choice, and with it the limits that it meets.
        matcher.accept(matcher.forced())
        matcher.allowed()
    if matcher.failure is not None:
        raise RequestError(f"{field} cannot be followed: {matcher.failure}")
    if is_dead:
        raise RequestError(f"{field} cannot be followed: {_NO_TEXT}")


def _vocabulary(tokenizer: object, vocab_size: int, eos_ids: Sequence[int]) -> "LLTokenizer":
    try:
        from llguidance import LLTokenizer
    except ImportError as error:
        raise ConfigError(
            "response_format and required tools need a library that is absent "
            f"({error}); run pip install 'kvkeep[grammar]' on the server"
        ) from error
    backend = copy(getattr(tokenizer, "backend_tokenizer", None))
    if backend is None or not eos_ids:
        raise RequestError(
            "response_format needs a fast tokenizer with an end token, which this model has not; leave it out"
        )
    backend.no_padding()
    backend.no_truncation()
    num_tokens = max(vocab_size, backend.get_vocab_size(with_added_tokens=True))
    return LLTokenizer(backend.to_str(), n_vocab=num_tokens, eos_token=list(eos_ids))


def _rule(name: str, schema: Mapping[str, Any]) -> str:
    return f"{name}: %json {json.dumps({**schema, 'x-guidance': _LAYOUT})}"


def _reason(message: str) -> str:
    """The first line of the library's message; the rest is its inner state."""
    lines = _PLACE.sub("", message.replace(_NO_STATE, "").strip()).splitlines() or [_NO_TEXT]
    return lines[0][:_MAX_REASON]
