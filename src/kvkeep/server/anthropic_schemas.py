"""What /v1/messages and /v1/messages/count_tokens take."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kvkeep.server.body_limits import Entries, FewEntries
from kvkeep.server.cache_fields import CachedRequest
from kvkeep.server.sampling_fields import SamplingRequest

__all__ = ["Block", "CountTokensRequest", "InputMessage", "MessagesRequest", "Tool", "ToolChoice"]

# any: the type of a block decides what else it holds
Block = dict[str, Any]
_Blocks = Entries[Block]


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class InputMessage(_Open):
    """One turn: text, or blocks of text, calls of tools and their results."""

    role: Literal["user", "assistant", "system"]
    content: str | _Blocks
    kv_cache: dict[str, Any] | None = Field(None, description="tags of this turn and all behind it")


class Tool(_Open):
    """A tool that the client runs."""

    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None
    cache_control: dict[str, Any] | None = None


class ToolChoice(_Open):
    """Whether tools may be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CountTokensRequest(CachedRequest):
    """A prompt: what of a request the model reads."""

    model: str | None = None
    messages: Annotated[Entries[InputMessage], Field(min_length=1)]
    system: str | _Blocks | None = None
    tools: FewEntries[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None


class MessagesRequest(CountTokensRequest, SamplingRequest):
    """A prompt and how to answer it; besides the protocol's own settings those of the other routes."""

    max_tokens: int = Field(ge=0, description="0 only fills the cache")
    stop_sequences: FewEntries[str] | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    diagnostics: dict[str, Any] | None = None
