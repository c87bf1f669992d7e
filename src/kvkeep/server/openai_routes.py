"""The routes of the OpenAI protocol that compute: chat and plain completions."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from kvkeep.server.auth import Asker
from kvkeep.server.model_profile import Profile
from kvkeep.server.openai_chat import answer_chat
from kvkeep.server.openai_completions import answer_completion
from kvkeep.server.openai_schemas import ChatRequest, CompletionRequest
from kvkeep.server.service import Serving

__all__ = ["routes"]


def routes() -> APIRouter:
    """A router with /v1/chat/completions and /v1/completions."""
    router = APIRouter(tags=["openai"])

    @router.post("/v1/chat/completions", response_model=None)
    async def chat_completions(
        request: Request, body: ChatRequest, asker: Asker, service: Serving, profile: Profile
    ) -> Response:
        """Answer a conversation."""
        return await answer_chat(request, body, asker, service, profile)

    @router.post("/v1/completions", response_model=None)
    async def completions(
        request: Request, body: CompletionRequest, asker: Asker, service: Serving, profile: Profile
    ) -> Response:
        """Complete one or several prompts."""
        return await answer_completion(request, body, asker, service, profile)

    return router
