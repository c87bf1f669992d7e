"""How the next token of a request is chosen, and when the request ends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvkeep.config.grammar import Grammar
from kvkeep.config.nearest import checked_names
from kvkeep.errors import ConfigError

__all__ = ["MAX_TOP_LOGPROBS", "SamplingParams"]

# The most alternatives per token that the OpenAI protocol lets a client ask for.
MAX_TOP_LOGPROBS = 20


@checked_names
@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends.

    Choice, applied in this order:
        repetition_penalty: 0.01 to 100, 1 = off. Divides positive and multiplies negative
            logits of every token that occurs in the prompt or the output (CTRL, arXiv:1909.05858).
        presence_penalty: -2 to 2. Subtracted from the logit of tokens that occur in the output.
        frequency_penalty: -2 to 2. Subtracted once per occurrence in the output.
        logit_bias: Token id to a number, -100 to 100, added to its logit; unknown ids change nothing.
        grammar: What the output must match: every token that it forbids is never chosen.
        temperature: 0 to 1000. Divides the logits; 0 takes the most likely token.
        top_k: Keep the k most likely tokens, 0 = off; 1 takes the most likely token.
        min_p: 0 to 1, 0 = off. Keep tokens at least this likely relative to the most likely one.
        top_p: 0 to 1, 1 = off. Keep the fewest most likely tokens that reach this share of what
            is left; one token is always kept.
        seed: Whole number that makes the choice repeatable; None draws a fresh one.
        n: Number of outputs for the prompt.

    End:
        max_tokens: Most tokens of one output; 0 only fills the cache.
        min_tokens: So many tokens come before one that ends the output can be chosen, and before a stop
            text that is complete ends it. Not with a grammar, which alone says where its output ends.
        stop: Text, or several, that ends an output as soon as it is complete.
        stop_token_ids: Tokens that end an output.
        include_stop: Keep the stop text in the output.
        ignore_eos: Go on after the model's end-of-sequence token.

    Text:
        skip_special_tokens: Leave special tokens out of the text; the one that ends it always is.

    Report:
        logprobs: Number of most likely alternatives to report per token, up to 20; 0 reports the
            chosen token only, None nothing.

    Raises:
        ConfigError: A field has a value it cannot have.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: Grammar | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        _require_int("max_tokens", self.max_tokens, least=0)
        _require_int("min_tokens", self.min_tokens, least=0)
        if self.min_tokens > self.max_tokens:
            raise ConfigError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}; give less"
            )
        _require_number("temperature", self.temperature, least=0.0, most=1000.0)
        _require_int("top_k", self.top_k, least=0)
        _require_number("top_p", self.top_p, least=0.0, most=1.0)
        _require_number("min_p", self.min_p, least=0.0, most=1.0)
        # Beyond these a logit overflows float32.
        _require_number("repetition_penalty", self.repetition_penalty, least=0.01, most=100.0)
        _require_number("presence_penalty", self.presence_penalty, least=-2.0, most=2.0)
        _require_number("frequency_penalty", self.frequency_penalty, least=-2.0, most=2.0)
        if self.seed is not None:
            _require_int("seed", self.seed)
        if self.logprobs is not None:
            _require_int("logprobs", self.logprobs, least=0, most=MAX_TOP_LOGPROBS)
        _require_int("n", self.n, least=1)
        for name in ("include_stop", "ignore_eos", "skip_special_tokens"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ConfigError(f"{name}={value!r} is not a bool; give True or False")
        if self.grammar is not None and self.ignore_eos:
            raise ConfigError("ignore_eos=True lets no grammar end; leave one of them out")
        if self.grammar is not None and self.min_tokens:
            raise ConfigError(
                f"min_tokens={self.min_tokens} keeps a grammar from ending; leave one of them out"
            )
        _require_biases(self.logit_bias)
        _require_stop_texts(self.stop)
        _require_token_ids(self.stop_token_ids)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The texts of `stop`, however they were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken, so that nothing is random."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def adjusts_logits(self) -> bool:
        """Whether the choice is made from other logits than the model's own."""
        has_limits = self.grammar is not None or self.min_tokens > 0
        return self.needs_history or bool(self.logit_bias) or has_limits

    @property
    def needs_history(self) -> bool:
        """Whether penalties make the choice depend on the tokens before it."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )


def _allowed(least: float | None, most: float | None) -> str:
    if least is None:
        return "any whole number"
    return f"{least:g} or more" if most is None else f"{least:g} to {most:g}"


def _require_int(
    field: str, value: object, *, least: int | None = None, most: int | None = None
) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{field}={value!r} is not a whole number; give {_allowed(least, most)}")
    if (least is not None and value < least) or (most is not None and value > most):
        raise ConfigError(f"{field}={value} is out of range; give {_allowed(least, most)}")


def _require_number(field: str, value: object, *, least: float, most: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{field}={value!r} is not a number; give {_allowed(least, most)}")
    # Asked this way round because NaN compares false with everything.
    if not least <= value <= most:
        raise ConfigError(f"{field}={value} is out of range; give {_allowed(least, most)}")


def _require_biases(biases: object) -> None:
    if not isinstance(biases, Mapping):
        raise ConfigError(f"logit_bias={biases!r:.80} is no mapping; give {{token id: bias}}")
    for token_id, bias in biases.items():
        _require_int("logit_bias", token_id, least=0)
        _require_number("logit_bias", bias, least=-100.0, most=100.0)


def _require_stop_texts(stop: object) -> None:
    if isinstance(stop, bytes) or not isinstance(stop, Sequence):
        raise ConfigError(f"stop={stop!r} is not text; give a string or a sequence of strings")
    texts = (stop,) if isinstance(stop, str) else stop
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ConfigError(
                f"stop={stop!r} holds {text!r}; give texts of at least one character, () for none"
            )


def _require_token_ids(token_ids: object) -> None:
    if isinstance(token_ids, str | bytes) or not isinstance(token_ids, Sequence):
        raise ConfigError(f"stop_token_ids={token_ids!r} is not a sequence; give a list")
    for token_id in token_ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise ConfigError(
                f"stop_token_ids={token_ids!r} holds {token_id!r}; give token ids, 0 or more"
            )
