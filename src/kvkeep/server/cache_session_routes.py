"""/v1/cache/sessions: conversations that use blocks; closing, forking, exporting them; and import."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import mkstemp
from typing import Any

from fastapi import APIRouter, Request
from starlette.background import BackgroundTask
from starlette.responses import FileResponse

from kvkeep.cache import SessionReport
from kvkeep.cache.slices import Bits
from kvkeep.errors import CorruptBlockError, RequestError
from kvkeep.llm import LLM
from kvkeep.server.cache_contexts import session_of_context
from kvkeep.server.cache_inspection import inspection_of
from kvkeep.server.cache_orders import close_session, planned_close, session_of
from kvkeep.server.cache_schemas import ForkRequest, SessionChange
from kvkeep.server.cache_scope import AdminScope, AskerScope
from kvkeep.server.cache_state import Kept
from kvkeep.server.cache_work import purge_fields, session_fields
from kvkeep.server.errors import ApiError
from kvkeep.server.service import Service, Serving

__all__ = ["export_file", "routes"]

_SUFFIX = ".kvkeep.safetensors"
# The body is read as it comes: it is no field of any model.
_FILE_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


def routes() -> APIRouter:
    """The router of sessions."""
    router = APIRouter()
    _add_questions(router)
    _add_change(router)
    _add_orders(router)
    _add_files(router)
    return router


def _add_questions(router: APIRouter) -> None:
    @router.get("/v1/cache/sessions")
    async def sessions(scope: AskerScope, kept: Kept, salt: str | None = None) -> dict[str, Any]:
        """All sessions of the asker, of everybody for an administrator."""
        salts = scope.salts(salt)

        contexts = [(one.salt, session_of_context(one.name)) for one in kept.contexts.all(salts)]

        def ask(llm: LLM) -> Bits[list[SessionReport]]:
            roots = {llm.engine.namespace(one).root_key() for one in salts}
            of_contexts = {
                (llm.engine.namespace(salt).root_key(), session) for salt, session in contexts
            }
            reports = yield from inspection_of(llm).sessions()
            return [
                one
                for one in reports
                if (not roots or one.namespace in roots)
                and (one.namespace, one.name) not in of_contexts
            ]

        own = await kept.inspections.ask(scope.tenant, ask)
        rows = [scope.named(session_fields(one), one.namespace) for one in own]
        return {"object": "list", "data": rows}

    @router.get("/v1/cache/sessions/{session_id:path}")
    async def session(
        service: Serving, scope: AskerScope, session_id: str, salt: str | None = None
    ) -> dict[str, Any]:
        """One session."""
        report = await service.call(session_of(session_id, scope.salt(salt)))
        return scope.named(session_fields(report), report.namespace)


def _add_change(router: APIRouter) -> None:
    @router.patch("/v1/cache/sessions/{session_id:path}")
    async def change(
        asked: SessionChange,
        service: Serving,
        scope: AskerScope,
        session_id: str,
        salt: str | None = None,
    ) -> dict[str, Any]:
        """Let a session end so long after its last use."""
        own = scope.salt(salt)

        def order(llm: LLM) -> SessionReport:
            return llm.cache.change_session(session_id, ttl=asked.ttl, salt=own)

        return await _ordered(service, session_id, own, order)


def _add_orders(router: APIRouter) -> None:
    @router.delete("/v1/cache/sessions/{session_id:path}")
    async def close(
        service: Serving,
        scope: AskerScope,
        kept: Kept,
        session_id: str,
        salt: str | None = None,
        *,
        dry_run: bool = False,
    ) -> dict[str, Any]:
        """Close a session: blocks that only it uses are forgotten everywhere, shared ones stay."""
        own = scope.salt(salt)
        await service.call(session_of(session_id, own))
        if dry_run:
            return purge_fields(
                await planned_close(kept.inspections, scope.tenant, session_id, own)
            )
        receipt = await close_session(service, session_id, own)
        kept.events.purged(receipt, scope.owner)
        return purge_fields(receipt)

    @router.post("/v1/cache/sessions/{session_id:path}/fork", status_code=201)
    async def fork(
        asked: ForkRequest,
        service: Serving,
        scope: AskerScope,
        session_id: str,
        salt: str | None = None,
    ) -> dict[str, Any]:
        """Begin another session that uses all that this one does."""
        own = scope.salt(salt)

        def order(llm: LLM) -> SessionReport:
            return llm.cache.fork_session(session_id, asked.session, salt=own)

        return await _ordered(service, session_id, own, order)


async def _ordered(
    service: Service, session_id: str, salt: str | None, order: Callable[[LLM], SessionReport]
) -> dict[str, Any]:
    """Carry out an order for a session that there is. Raises ApiError 404 where there is none."""
    known = session_of(session_id, salt)

    def carry_out(llm: LLM) -> SessionReport:
        known(llm)
        return order(llm)

    return session_fields(await service.call(carry_out))


def _add_files(router: APIRouter) -> None:
    @router.post("/v1/cache/sessions/{session_id:path}/export", response_class=FileResponse)
    async def export(
        service: Serving, scope: AskerScope, session_id: str, salt: str | None = None
    ) -> FileResponse:
        """The blocks of the session's last request as one file, for `/v1/cache/import`."""
        effective = scope.salt(salt)
        known = session_of(session_id, effective)

        def order(llm: LLM, path: Path) -> None:
            known(llm)
            llm.cache.export_session(path, session_id, salt=effective)

        return await export_file(service, order)

    @router.post("/v1/cache/import", openapi_extra=_FILE_BODY)
    async def import_(
        request: Request, service: Serving, scope: AdminScope, kept: Kept, salt: str | None = None
    ) -> dict[str, Any]:
        """Enter the blocks of an exported file, which is the body, as blocks of the asker."""
        path = _temporary_file()
        try:
            with path.open("wb") as file:
                async for part in request.stream():
                    file.write(part)
            effective = scope.salt(salt)
            kept.tenants.learn(scope.tenant, effective)
            receipt = await service.call(lambda llm: llm.cache.import_(path, salt=effective))
        except (CorruptBlockError, RequestError) as error:
            # The client knows no path of ours.
            message = str(error).replace(f"path={str(path)!r}", "the file")
            raise ApiError(400, message, code="not_importable") from error
        finally:
            path.unlink(missing_ok=True)
        return {
            "object": "cache.import",
            "added": receipt.num_added,
            "present": receipt.num_present,
            "no_room": receipt.num_no_room,
        }


async def export_file(service: Service, order: Callable[[LLM, Path], None]) -> FileResponse:
    """A file that `order` writes on the engine's thread, as a download; it is deleted behind it."""
    path = _temporary_file()
    try:
        await service.call(lambda llm: order(llm, path))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return FileResponse(
        path,
        filename=f"session{_SUFFIX}",
        media_type="application/octet-stream",
        background=BackgroundTask(partial(_remove, path)),
    )


def _temporary_file() -> Path:
    descriptor, name = mkstemp(prefix="kvkeep-", suffix=_SUFFIX)
    with open(descriptor, "wb"):  # noqa: PTH123  closes the descriptor
        return Path(name)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)
