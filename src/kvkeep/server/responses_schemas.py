"""What /v1/responses takes."""

from typing import Any

from pydantic import Field

from kvkeep.server.body_limits import Entries, FewEntries, FewFields
from kvkeep.server.cache_fields import CachedRequest
from kvkeep.server.sampling_fields import SamplingRequest

__all__ = ["InputItem", "ResponsesRequest"]

# any: the type of an item decides what else it holds
InputItem = dict[str, Any]


class ResponsesRequest(CachedRequest, SamplingRequest):
    """A prompt, perhaps the continuation of an earlier response, and how to answer it.

    Besides the protocol's own settings of sampling it takes those of the other routes.
    """

    model: str | None = None
    input: str | Entries[InputItem] = ""
    instructions: str | None = None
    previous_response_id: str | None = Field(
        None, description="continue this response, in its session"
    )
    store: bool | None = Field(
        None, description="false: keep nothing that another request could continue"
    )
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    max_output_tokens: int | None = Field(None, ge=0, description="0 only fills the cache")
    top_logprobs: int | None = None
    include: FewEntries[str] | None = None
    text: dict[str, Any] | None = None
    tools: FewEntries[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    truncation: str | None = None
    reasoning: dict[str, Any] | None = None
    background: bool | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    metadata: FewFields[str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    user: str | None = None
