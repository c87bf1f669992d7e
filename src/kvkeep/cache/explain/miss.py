"""What is said of a request that the cache could have served better."""

from dataclasses import dataclass
from enum import StrEnum

from kvkeep.blocks import Namespace, TokenChain

__all__ = ["Miss", "MissType", "Outline", "Sent"]


class MissType(StrEnum):
    """Why tokens were computed that had been computed before, or why none had been."""

    FIRST_REQUEST = "first_request"  # nothing like it is known to have been sent
    MODEL_CHANGED = "model_changed"  # the same text was sent to other weights
    TEMPLATE_CHANGED = "template_changed"  # the chat template, or what it was told, is another
    SYSTEM_CHANGED = "system_changed"
    TOOLS_CHANGED = "tools_changed"
    MESSAGES_CHANGED = "messages_changed"
    SALT_CHANGED = "salt_changed"
    EVICTED = "evicted"  # others needed the room
    EXPIRED = "expired"  # its time to live has passed
    INVALIDATED = "invalidated"  # purged, dropped or cleared on purpose
    CODEC_CHANGED = "codec_changed"  # it is kept in another form, or in blocks of another size
    TOO_SHORT = "too_short"  # less than a block of tokens
    DISABLED = "disabled"  # the request did not want to read
    CORRUPT_REJECTED = "corrupt_rejected"  # a tier gave wrong bytes, or none
    QUICKER_COMPUTED = "quicker_computed"  # a tier has it, and computing was quicker than loading
    UNKNOWN = "unknown"  # it was sent before; why its blocks are gone is no longer known


@dataclass(frozen=True, kw_only=True, slots=True)
class Outline:
    """What a prompt is made of, where that is known.

    `message_starts` are the first tokens of the messages, in order, and `roles` their roles. `tools` and
    `template` are digests of what the template was given beside them, b"" of nothing, None where that is not
    known.
    """

    message_starts: tuple[int, ...] = ()
    roles: tuple[str, ...] = ()
    tools: bytes | None = None
    template: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """A prompt as it was sent.

    `owner` is the tenant: it is told of its prompts in other namespaces too, and nobody of those of others.
    Without an owner its namespace is all that is looked at. `reads`: the request wants what is cached.
    """

    namespace: Namespace
    chain: TokenChain
    outline: Outline = Outline()
    session: str | None = None
    owner: str | None = None
    reads: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Miss:
    """Why `missed_tokens` of the prompt were computed that need not have been.

    Of a changed prompt `first_divergent_token` is the first position where it differs from the one it is
    compared with, and `cached_ids` and `sent_ids` are a few tokens of both around it, from
    `snippet_start` on. `message_index` is the message with the first missed token. Of a first request
    nothing was known, so that `missed_tokens` is 0.
    """

    type: MissType
    missed_tokens: int
    first_divergent_token: int | None = None
    message_index: int | None = None
    snippet_start: int = 0
    cached_ids: tuple[int, ...] = ()
    sent_ids: tuple[int, ...] = ()
