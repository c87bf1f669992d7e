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

from kvkeep.config.grammar import Grammar, TokenMatcher
from kvkeep.errors import ConfigError, RequestError
from kvkeep.server.call_syntax import CallSyntax, HermesSyntax

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["AnswerForm", "Grammars"]

_MAX_KEPT = 64
# Compiling takes time that grows with the square of the schemas: about a second for so much.
_MAX_CHARACTERS = 2**17
_MAX_REASON = 300
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
        self._source_to_grammar: OrderedDict[str, Grammar] = OrderedDict()

    def compile(self, form: AnswerForm) -> Grammar:
        """The grammar of outputs of this form. Raises RequestError for one that cannot be followed."""
        source = self._source(form)
        found = self._find(source)
        if found is not None:
            return found
        # Without the lock: this may take a second, and others look for what there is.
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

    def _compiled(self, source: str, field: str) -> Grammar:
        with self._lock:
            vocabulary = self._loaded()
        from llguidance import LLMatcher  # absent where the extra is

        matcher = LLMatcher(vocabulary, source, log_level=0)
        if matcher.is_error():
            raise RequestError(f"{field} cannot be followed: {_reason(matcher.get_error())}")
        # A schema that only refers to itself is well formed, and nothing can begin as it says.
        if not any(_Matcher(matcher.deep_copy(), 0).allowed()):
            raise RequestError(f"{field} cannot be followed: no text is of this form")
        return _Compiled(matcher)

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

    def matcher(self) -> TokenMatcher:
        return _Matcher(self._start.deep_copy(), _num_bytes(self._start))


class _Matcher:
    """Follows one output."""

    def __init__(self, matcher: "LLMatcher", num_bytes: int) -> None:
        self._matcher = matcher
        self._num_bytes = num_bytes

    def accept(self, token_ids: Sequence[int]) -> None:
        if token_ids:
            # One that is not allowed puts it into a state in which nothing is.
            self._matcher.consume_tokens(list(token_ids))

    def allowed(self) -> bytes:
        if self._matcher.is_error():
            return bytes(self._num_bytes)
        mask = self._matcher.compute_bitmask()
        return bytes(self._num_bytes) if self._matcher.is_error() else mask


def _num_bytes(matcher: "LLMatcher") -> int:
    return len(matcher.deep_copy().compute_bitmask())


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
    lines = _PLACE.sub("", message.strip()).splitlines() or ["no reason given"]
    return lines[0][:_MAX_REASON]
