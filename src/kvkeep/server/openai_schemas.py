"""Requests of the OpenAI protocol. What is unknown is accepted; see cache_fields for what becomes of it."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kvkeep.config.sampling import MAX_TOP_LOGPROBS
from kvkeep.server.body_limits import Entries, FewEntries, TokenIds
from kvkeep.server.cache_fields import CachedRequest
from kvkeep.server.sampling_fields import SamplingRequest

__all__ = [
    "ChatMessage",
    "ChatRequest",
    "CompletionRequest",
    "Function",
    "NamedTool",
    "ResponseFormat",
    "StreamOptions",
    "Tool",
]

# As many prompts as one request may bring.
MAX_PROMPTS = 256

_OPEN = ConfigDict(extra="allow", strict=True)
_Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
_Ids = Annotated[TokenIds[Annotated[int, Field(ge=0)]], Field(min_length=1)]
_ManyIds = Annotated[list[_Ids], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]


class StreamOptions(BaseModel):
    """What a stream says beside its text."""

    model_config = _OPEN

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(None, description="counts with every piece")


class _Answerable(CachedRequest, SamplingRequest):
    """What requests of both kinds have. The last fields are accepted and change nothing here."""

    model_config = _OPEN

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=0, description="0 computes the prompt for the cache")
    return_token_ids: bool | None = None

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None


class ChatMessage(BaseModel):
    """One message of a conversation; the chat template decides what else it may hold."""

    model_config = _OPEN

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Entries[dict[str, Any]] | None = None
    tool_calls: FewEntries[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class Function(BaseModel):
    """A function that the client can run; `parameters` is a JSON schema."""

    model_config = _OPEN

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A tool that the model may call."""

    model_config = _OPEN

    type: Literal["function"]
    function: Function


class _FunctionName(BaseModel):
    """The name of a function."""

    model_config = _OPEN

    name: str


class NamedTool(BaseModel):
    """The tool that the model has to call."""

    model_config = _OPEN

    type: Literal["function"]
    function: _FunctionName


class _SchemaFormat(BaseModel):
    """A JSON schema that the answer has to match."""

    model_config = _OPEN

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What form the answer must have."""

    model_config = _OPEN

    type: Literal["text", "json_object", "json_schema"]
    json_schema: _SchemaFormat | None = None


class ChatRequest(_Answerable):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[Entries[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=0, description="comes before max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: FewEntries[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None


class CompletionRequest(_Answerable):
    """The body of POST /v1/completions."""

    prompt: str | _Texts | _Ids | _ManyIds
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None
    add_special_tokens: bool | None = None
