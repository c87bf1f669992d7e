"""From text and conversations to token ids, and where in them each message begins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvkeep.errors import RequestError
from kvkeep.server.errors import ApiError
from kvkeep.server.message_places import MessagePlaces
from kvkeep.server.prompt_tokens import EncodedText, text_tokenizer

__all__ = ["EncodedPrompt", "PromptEncoder"]

# Text parts of one message are joined by this: most templates want one text.
_PART_SEPARATOR = "\n"
_TEXT_PARTS = ("text", "input_text", "output_text")
# Whose messages may be calls alone.
_ANSWERER = "assistant"
# What a client may not set: how we call the template, and the template itself, which is a program.
_OWN_OPTIONS = frozenset(
    {
        "conversation", "tools", "chat_template", "add_generation_prompt", "tokenize",
        "return_dict", "return_tensors", "return_assistant_tokens_mask", "padding", "truncation",
        "max_length", "tokenizer_kwargs", "sanitize_control_tokens",
    }
)  # fmt: skip
# Text is counted by its beginning first, so many characters for each token that may be.
_CHARACTERS_PER_TOKEN = 8
# Tokens that the end of a beginning can have more than the same text with what follows.
_CUT_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedPrompt:
    """Token ids of a prompt, and the first token of each message and of each of its content parts.

    `message_starts` has an entry for each message, in order; the first is 0, since what a template writes
    before the first message counts to it. `part_starts` has an entry for each message: a token index for
    each of its parts, or one in all for content that is plain text. Both are empty for plain text, and say 0
    for tokenizers that cannot tell.
    """

    ids: tuple[int, ...]
    message_starts: tuple[int, ...] = ()
    part_starts: tuple[tuple[int, ...], ...] = ()


class PromptEncoder:
    """Encodes for one tokenizer, which may be None: then only token ids can be served.

    Everything is synchronous and may run in several threads; Service has the same without blocking the loop.
    Text that must have more than `max_tokens` is refused by its characters, before it is encoded whole.
    """

    def __init__(self, tokenizer: Any, *, max_tokens: int) -> None:  # noqa: ANN401  one of transformers
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._places = MessagePlaces()
        if tokenizer is not None:
            self._text_tokenizer = text_tokenizer(tokenizer)
            # No token stands for more characters than its name has.
            longest = max(map(len, tokenizer.get_vocab()), default=1)
            self._max_characters = max_tokens * longest

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be encoded."""
        return bool(getattr(self._tokenizer, "chat_template", None))

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template says something about tools."""
        return "tools" in str(getattr(self._tokenizer, "chat_template", None))

    def encode_text(self, text: str, *, add_special_tokens: bool = True) -> EncodedPrompt:
        """Token ids of plain text, as LLM.encode gives them.

        Raises RequestError without a tokenizer, ApiError 400 for text that is too long.
        """
        encoded = self._encode(text, add_special_tokens=add_special_tokens)
        return EncodedPrompt(ids=tuple(encoded.ids))

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> EncodedPrompt:
        """Token ids of a conversation in the model's chat template, as LLM.encode_chat gives them.

        `content` of a message is text, None, or parts of {"type": "text", "text": ...}, joined by newlines.
        `template_options` are further variables of the template ("enable_thinking").
        Raises RequestError for other parts, and where the template refuses the conversation; ApiError 400
        for one that is too long.
        """
        if not self.has_chat_template:
            raise RequestError("the model has no chat template; send a plain prompt instead")
        options = _checked_options(template_options)
        contents = _contents(messages)
        self._refuse_characters(sum(len(part) for parts in contents for part in parts))
        plain = [_plain(message, parts) for message, parts in zip(messages, contents, strict=True)]

        def render(num_messages: int, *, generation: bool) -> str:
            return self._render(plain[:num_messages], tools, options, generation=generation)

        def render_first(num_messages: int) -> str | None:
            try:
                return render(num_messages, generation=False)
            except RequestError:
                return None

        rendered = render(len(plain), generation=add_generation_prompt)
        encoded = self._encode(rendered, add_special_tokens=False)
        places = self._places.find(rendered, contents, render_first)
        return EncodedPrompt(
            ids=tuple(encoded.ids),
            message_starts=tuple(encoded.token_at(place.start) for place in places),
            part_starts=tuple(
                tuple(encoded.token_at(start) for start in place.part_starts) for place in places
            ),
        )

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of tokens. Raises RequestError without a tokenizer, and for ids that it does not know."""
        self._need_tokenizer()
        num_known = len(self._tokenizer)
        for token_id in token_ids:
            if not 0 <= token_id < num_known:
                raise RequestError(
                    f"tokens has {token_id}, but the tokenizer knows 0 to {num_known - 1}"
                )
        return str(
            self._tokenizer.decode(
                list(token_ids),
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        )

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        options: Mapping[str, Any],
        *,
        generation: bool,
    ) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tools=[dict(tool) for tool in tools] if tools else None,
                    tokenize=False,
                    add_generation_prompt=generation,
                    **options,
                )
            )
        except Exception as error:  # a template is a program of somebody else's
            _refuse_silence(messages, error)
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise RequestError(
                f"messages cannot be written in the model's chat template ({reason}); change the roles or "
                "contents that it names"
            ) from error

    def _encode(self, text: str, *, add_special_tokens: bool) -> EncodedText:
        self._need_tokenizer()
        self._refuse_characters(len(text))
        _refuse_surrogates(text)
        # Several times what fits cannot shrink to it: its beginning tells, without encoding the rest.
        num_characters = self._max_tokens * _CHARACTERS_PER_TOKEN
        while num_characters < len(text):
            beginning = text[:num_characters].rpartition(" ")[0]
            encoded = self._text_tokenizer.encode(beginning, add_special_tokens=False)
            if len(encoded.ids) > self._max_tokens + _CUT_TOKENS:
                raise self._too_long(f"more than {self._max_tokens} tokens")
            num_characters *= 4
        return self._text_tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _need_tokenizer(self) -> None:
        if self._tokenizer is None:
            raise RequestError("the model has no tokenizer; send token ids instead of text")

    def _refuse_characters(self, num_characters: int) -> None:
        if num_characters > self._max_characters:
            raise self._too_long(f"{num_characters} characters")

    def _too_long(self, what: str) -> ApiError:
        return ApiError(
            400,
            f"the prompt has {what}, but at most {self._max_tokens} tokens are taken; shorten the prompt",
            code="context_length_exceeded",
        )


def _refuse_surrogates(text: str) -> None:
    """JSON can write half of a character; no tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the prompt has half a character (U+{ord(text[error.start]):04X}) at position {error.start}; "
            "send valid Unicode"
        ) from error


def _contents(messages: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The text parts of every message."""
    if not messages:
        raise RequestError("messages is empty; send at least one")
    return [_parts(number, message) for number, message in enumerate(messages)]


def _parts(number: int, message: Mapping[str, Any]) -> list[str]:
    if not isinstance(message.get("role"), str):
        raise RequestError(f'messages[{number}] has no role; give "system", "user" or "assistant"')
    content = message.get("content")
    if content is None and message["role"] != _ANSWERER:
        what = "null" if "content" in message else "missing"
        raise RequestError(
            f"messages[{number}].content is {what}; give text (only an answer with tool_calls has none)"
        )
    if content is None or isinstance(content, str):
        return [content or ""]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise RequestError(f"messages[{number}].content is neither text nor a list of parts")
    texts = []
    for at, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) else part
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise RequestError(
                f"messages[{number}].content[{at}] is of type {kind!r:.60}; the server takes text only"
            )
        texts.append(text)
    return texts


def _refuse_silence(messages: Sequence[Mapping[str, Any]], error: Exception) -> None:
    """Raise RequestError where a template has failed, and an answer has neither text nor calls."""
    for number, message in enumerate(messages):
        if message.get("content") is None and not message.get("tool_calls"):
            raise RequestError(
                f"messages[{number}].content is null, and there are no tool_calls; give text"
            ) from error


def _plain(message: Mapping[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """The message as a template expects it: one text, or None as it came."""
    if message.get("content") is None:
        return dict(message)
    return {**message, "content": _PART_SEPARATOR.join(parts)}


def _checked_options(options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    for name in options or {}:
        if name in _OWN_OPTIONS:
            raise RequestError(
                f"chat_template_kwargs has {name!r}, which the server sets itself; leave it out"
            )
    return options or {}
