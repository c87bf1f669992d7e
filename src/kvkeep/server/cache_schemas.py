"""What the routes of the cache are asked. A field that is unknown is refused: a purge must not mean more."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvkeep.config.cache_options import MAX_NAME_LENGTH
from kvkeep.server.body_limits import Entries, FewEntries, TokenIds, check_num_fields
from kvkeep.server.cache_fields import KVCacheObject

__all__ = [
    "ContextChange",
    "ContextRequest",
    "EntryQuery",
    "ForkRequest",
    "LookupRequest",
    "OnePrompt",
    "PinRequest",
    "PromptFields",
    "PurgeRequest",
    "QuotaRequest",
    "SessionChange",
    "VerifyRequest",
]

# What the server puts before and behind the names of contexts and pins has room as well.
_MAX_OWN_CHARACTERS = MAX_NAME_LENGTH - 64
_MAX_LIST = 1024
# Choices of a purge that mean all of somebody.
_WHOM: Sequence[AbstractSet[str]] = ({"salt"}, {"tenant"}, {"salt", "tenant"})

Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_LENGTH)]
OwnName = Annotated[str, Field(min_length=1, max_length=_MAX_OWN_CHARACTERS)]
Names = Annotated[FewEntries[Name], Field(max_length=_MAX_LIST)]
Duration = float | str


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    # Each field that is unknown would be an error of its own.
    _check_size = model_validator(mode="before")(check_num_fields)


class PromptFields(_Strict):
    """A prompt in one of three forms: messages, text, or token ids."""

    messages: Entries[dict[str, Any]] | None = Field(
        default=None, description="a conversation, as in chat"
    )
    prompt: str | None = Field(default=None, description="plain text")
    token_ids: TokenIds[Annotated[int, Field(ge=0, lt=2**32)]] | None = None
    tools: FewEntries[dict[str, Any]] | None = Field(default=None, description="with messages only")
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="with messages only"
    )
    add_generation_prompt: bool = Field(
        default=True, description="with messages: up to where the answer begins"
    )
    salt: str | None = None
    model: str | None = None

    @property
    def num_forms(self) -> int:
        """How many of the three forms are given."""
        return sum(one is not None for one in (self.messages, self.prompt, self.token_ids))


class OnePrompt(PromptFields):
    """A prompt in exactly one of the forms."""

    @model_validator(mode="after")
    def _check_form(self) -> "OnePrompt":
        if self.num_forms != 1:
            raise ValueError(
                f"{self.num_forms} of messages, prompt and token_ids are given; give exactly one"
            )
        return self


class EntryQuery(_Strict):
    """Which entries to list, how, and how many."""

    session: str | None = None
    tag: str | None = None
    tier: str | None = None
    salt: str | None = None
    by: Literal["block", "labels"] = "block"
    sort: Literal["bytes", "last_used", "created"] = "last_used"
    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    after: str | None = None
    tenant: str | None = Field(default=None, description="with the admin key: its blocks")


class LookupRequest(OnePrompt):
    """Ask what the cache knows of a prompt that was not sent: the body of a request to compute it will do.

    Nothing is changed by it, so that fields which say nothing of the prompt are not looked at.
    """

    model_config = ConfigDict(extra="ignore")

    session: Name | None = Field(
        default=None, description="compare with the last prompt of this session"
    )
    kv_cache: KVCacheObject | None = Field(default=None, description="its session and salt")
    session_id: str | None = Field(default=None, description="session")
    cache_salt: str | None = Field(default=None, description="salt")

    @property
    def asked_session(self) -> str | None:
        """The session, by whatever name it came."""
        named = None if self.kv_cache is None else self.kv_cache.session
        return self.session or named or self.session_id

    @property
    def asked_salt(self) -> str | None:
        """The salt, by whatever name it came."""
        named = None if self.kv_cache is None else self.kv_cache.salt
        return next((one for one in (self.salt, named, self.cache_salt) if one is not None), None)


class ContextRequest(OnePrompt):
    """Compute a prompt ahead and keep it under a name."""

    name: OwnName
    ttl: Duration | None = Field(default=None, description='seconds, "30m", "never"')
    tags: Names = Field(default_factory=list)
    pin: bool = False


class ContextChange(_Strict):
    """What to change in a context; what is left out stays."""

    ttl: Duration | None = None
    pinned: bool | None = None
    tags: Names | None = Field(default=None, description="further tags; those there are stay")


class ForkRequest(_Strict):
    """The name of the new session."""

    session: Name


class SessionChange(_Strict):
    """When a session ends."""

    ttl: Duration = Field(description='after its last use: seconds, "30m", "never"')


class PurgeRequest(_Strict):
    """Which blocks to forget: those that fit all fields given, of one field any of its values."""

    all: bool = Field(default=False, description="everything; not together with other choices")
    sessions: Names = Field(default_factory=list, description="blocks that only these sessions use")
    tags: Names = Field(default_factory=list)
    salt: str | None = Field(default=None, description="blocks of requests with this salt")
    tenant: str | None = Field(default=None, description="blocks of the tenant of this id (admin)")
    prefix: OnePrompt | None = Field(default=None, description="the full blocks of a prompt")
    older_than: Duration | None = None
    unused_for: Duration | None = None
    tiers: Names | None = Field(
        None, description='"device" and names of tiers; default: everywhere'
    )
    include_pinned: bool = Field(
        default=False, description="pinned blocks too; with salt alone that erases the tenant"
    )
    dry_run: bool = False

    @property
    def erases_tenant(self) -> bool:
        """Whether nothing is to be left of a tenant, its contexts included."""
        given = self.model_dump(exclude_defaults=True).keys()
        return "include_pinned" in given and given - {"include_pinned"} in _WHOM


class VerifyRequest(_Strict):
    """What to check."""

    tiers: bool = Field(default=False, description="read and compare all that is in the tiers too")


class PinRequest(PromptFields):
    """What to pin, and under which name: a prompt, a context, or what a session sent last."""

    name: OwnName | None = Field(
        default=None, description="default: the name of the context or session"
    )
    context: Name | None = None
    session: Name | None = None

    @model_validator(mode="after")
    def _check_target(self) -> "PinRequest":
        num_targets = self.num_forms + (self.context is not None) + (self.session is not None)
        if num_targets != 1:
            raise ValueError(
                f"{num_targets} of messages, prompt, token_ids, context and session are given; give one"
            )
        if self.name is None and self.num_forms:
            raise ValueError("name is missing; give the pin of a prompt a name")
        return self

    @property
    def pin_name(self) -> str:
        """The name of the pin."""
        name = self.name or self.context or self.session
        assert name is not None
        return name


class QuotaRequest(_Strict):
    """The most bytes that blocks of a tenant may take."""

    limit_bytes: Annotated[int, Field(ge=1)] | str = Field(description='bytes, or "4GB"')
    tier: Name | None = Field(
        None, description='"device" or a tier of this machine; default: anywhere, each block once'
    )
