"""Routes that every server of this kind has: is it well, which model, text to tokens and back."""

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse

from kvkeep import __version__
from kvkeep.errors import RequestError
from kvkeep.server.auth import Asker, Tenant
from kvkeep.server.body_limits import Entries, FewEntries, TokenIds
from kvkeep.server.disconnect import unless_disconnected
from kvkeep.server.prompts import EncodedPrompt
from kvkeep.server.service import Service, ServiceState, Serving
from kvkeep.server.unknown_routes import served_paths

__all__ = ["routes"]

_NOT_READY = {
    ServiceState.LOADING: ("the model is loading; try again later", "unavailable_error"),
    ServiceState.STOPPING: ("the server stops; send requests to another", "unavailable_error"),
    ServiceState.FAILED: ("the engine has failed; restart the server", "server_error"),
}


class TokenizeRequest(BaseModel):
    """Text (`prompt`, or `content`), or a conversation (`messages`)."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: Entries[dict[str, Any]] | None = None
    tools: FewEntries[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class TokenizeResponse(BaseModel):
    """The tokens, how many, and how many the model can take. `message_starts`: for a conversation."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None
    message_starts: list[int] | None = None


class DetokenizeRequest(BaseModel):
    """Token ids."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    tokens: Annotated[TokenIds[int], Field(max_length=1_000_000)]
    skip_special_tokens: bool = False


class DetokenizeResponse(BaseModel):
    """The text, under both names that clients know."""

    prompt: str
    content: str


class VersionResponse(BaseModel):
    """Which kvkeep this is."""

    version: str


class RootResponse(BaseModel):
    """What this is; the OpenAPI document describes the paths."""

    name: str = "kvkeep"
    version: str = __version__
    model: str
    description: str = (
        "Serves a model over the protocols of OpenAI (base URL ends with /v1) and Anthropic (without /v1), "
        "and keeps its KV cache."
    )
    openapi: str = "/openapi.json"
    documents: str = "docs/http.md in the repository of kvkeep"
    paths: list[str]


class ModelCard(BaseModel):
    """One model as OpenAI's API describes it; `max_model_len` counts prompt and output."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "kvkeep"
    max_model_len: int


class ModelList(BaseModel):
    """All models, which is one."""

    object: str = "list"
    data: list[ModelCard]


def routes() -> APIRouter:
    """/, /health, /version, /v1/models, /tokenize, /detokenize."""
    router = APIRouter(tags=["server"])
    router.add_api_route("/", root, methods=["GET"])
    router.add_api_route("/health", health, methods=["GET"])
    router.add_api_route("/version", version, methods=["GET"])
    router.add_api_route("/v1/models", models, methods=["GET"])
    # A hub id has slashes.
    router.add_api_route("/v1/models/{model_id:path}", model, methods=["GET"])
    router.add_api_route("/tokenize", tokenize, methods=["POST"])
    router.add_api_route("/detokenize", detokenize, methods=["POST"])
    return router


async def root(request: Request, service: Serving, _: Asker) -> RootResponse:
    """What this server is, and where its routes are described."""
    return RootResponse(model=service.model_id, paths=served_paths(request))


async def health(service: Serving) -> JSONResponse:
    """200 when requests are served, 503 while the model loads, when the engine has failed, and at the end."""
    if service.state is ServiceState.READY:
        return JSONResponse({"status": "ok"})
    message, kind = _NOT_READY[service.state]
    body = {"status": service.state, "error": {"message": message, "type": kind, "code": 503}}
    return JSONResponse(body, status_code=503, headers={"retry-after": "1"})


async def version(_: Asker) -> VersionResponse:
    """The version of kvkeep."""
    return VersionResponse(version=__version__)


async def models(service: Serving, _: Asker) -> ModelList:
    """The models that requests can name."""
    names = [name for name in service.settings.model_names if name != "*"]
    return ModelList(data=[_card(service, name) for name in (service.model_id, *names)])


async def model(model_id: str, service: Serving, _: Asker) -> ModelCard:
    """One of the models."""
    return _card(service, service.check_model(model_id))


async def tokenize(
    request: Request, body: TokenizeRequest, service: Serving, asker: Asker
) -> TokenizeResponse:
    """The tokens of a text or a conversation."""
    service.check_model(body.model)
    encoded = await unless_disconnected(request.receive, _encode(body, service, asker))
    strings = None
    if body.return_token_strs:
        decode = service.prompts.decode
        strings = await service.in_thread(asker, lambda: [decode([token]) for token in encoded.ids])
    return TokenizeResponse(
        count=len(encoded.ids),
        max_model_len=service.llm.installed.max_context,
        tokens=list(encoded.ids),
        token_strs=strings,
        message_starts=None if body.messages is None else list(encoded.message_starts),
    )


async def detokenize(body: DetokenizeRequest, service: Serving, asker: Asker) -> DetokenizeResponse:
    """The text of tokens."""
    service.check_model(body.model)
    text = await service.decode(asker, body.tokens, skip_special_tokens=body.skip_special_tokens)
    return DetokenizeResponse(prompt=text, content=text)


async def _encode(body: TokenizeRequest, service: Service, asker: Tenant) -> EncodedPrompt:
    if body.messages is not None:
        options: Mapping[str, Any] = body.chat_template_kwargs or {}
        return await service.encode_chat(
            asker,
            body.messages,
            body.tools,
            options,
            add_generation_prompt=body.add_generation_prompt,
        )
    text = body.prompt if body.prompt is not None else body.content
    if text is None:
        raise RequestError("prompt is missing; send prompt (text) or messages (a conversation)")
    return await service.encode_text(asker, text, add_special_tokens=body.add_special_tokens)


def _card(service: Service, name: str) -> ModelCard:
    return ModelCard(
        id=name, created=service.created_s, max_model_len=service.llm.installed.max_context
    )
