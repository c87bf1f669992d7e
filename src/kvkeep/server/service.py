"""What routes ask: one model, its prompt encoder, and the limits of the server."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from kvkeep.config.server import ServerSettings
from kvkeep.engine.async_engine import AsyncEngine
from kvkeep.errors import KVKeepError
from kvkeep.llm import LLM
from kvkeep.server.auth import Tenant
from kvkeep.server.errors import ApiError
from kvkeep.server.fair_threads import FairThreads
from kvkeep.server.jobs import Finished, Job, JobStream
from kvkeep.server.limits import Seats, TakenSeats
from kvkeep.server.prompts import EncodedPrompt, PromptEncoder

__all__ = ["Finished", "Job", "JobStream", "Service", "ServiceState", "Serving", "request_id_of"]

T = TypeVar("T")

_log = logging.getLogger(__name__)
_ANY_MODEL = "*"


class ServiceState(StrEnum):
    """What a service can do for its clients."""

    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"
    FAILED = "failed"


class _Loaded:
    """What there is once the model is loaded."""

    def __init__(self, llm: LLM, settings: ServerSettings) -> None:
        self.llm = llm
        self.engine = AsyncEngine(llm.engine)
        most = llm.installed.max_context
        self.max_prompt_tokens = min(most, settings.max_prompt_tokens or most)
        self.prompts = PromptEncoder(llm.tokenizer, max_tokens=self.max_prompt_tokens)
        self.seats = Seats(
            max_jobs=llm.settings.max_requests + settings.max_queued,
            max_per_tenant=settings.max_requests_per_key,
        )


class Service:
    """One model behind the routes; belongs to the event loop that calls `start`.

    `llm` may be a function that loads it: then `start` returns at once, and until the model is there every
    use raises ApiError 503. `begin_observers` are called on the loop before a job begins, `observers` when it
    has ended; they must be quick.

        encoded = await service.encode_chat(asker, messages)
        job = Job(prompt_ids=encoded.ids, ...)
        async with service.generate(job) as stream:
            async for piece in stream: ...
    """

    def __init__(
        self, llm: LLM | Callable[[], LLM], settings: ServerSettings, *, model_id: str
    ) -> None:
        self.settings = settings
        self.model_id = model_id
        self.created_s = int(time.time())
        self.begin_observers: list[Callable[[Job], None]] = []
        self.observers: list[Callable[[Finished], None]] = []
        self._source = llm
        self._loaded: _Loaded | None = None
        self._loading: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._failure: Exception | None = None
        most = settings.max_queued
        self._threads = FairThreads(settings.tokenizer_threads, "kvkeep-prompts", max_waiting=most)
        # One takes seconds; with more of them the model itself would have no core.
        self._compilers = FairThreads(1, "kvkeep-grammars", max_waiting=most)

    @property
    def state(self) -> ServiceState:
        """Whether requests are served."""
        if self._stopping.is_set():
            return ServiceState.STOPPING
        if self._failure is not None:
            return ServiceState.FAILED
        if self._loaded is None:
            return ServiceState.LOADING
        return ServiceState.READY if self._loaded.engine.is_healthy else ServiceState.FAILED

    @property
    def failure(self) -> Exception | None:
        """Why the model could not be loaded."""
        return self._failure

    @property
    def llm(self) -> LLM:
        """The model. Raises ApiError 503 while it is loading. Its engine belongs to a thread: use `call`."""
        return self._ready().llm

    @property
    def engine(self) -> AsyncEngine:
        """The engine's asynchronous side. Raises ApiError 503 while the model is loading."""
        return self._ready().engine

    @property
    def prompts(self) -> PromptEncoder:
        """The encoder, blocking. Raises ApiError 503 while the model is loading."""
        return self._ready().prompts

    @property
    def seats(self) -> Seats:
        """The seats of all jobs. Raises ApiError 503 while the model is loading."""
        return self._ready().seats

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt that is taken, in tokens. Raises ApiError 503 while the model is loading."""
        return self._ready().max_prompt_tokens

    @property
    def num_open(self) -> int:
        """Requests that wait or run."""
        return 0 if self._loaded is None else self._loaded.engine.num_open

    @property
    def num_preparing(self) -> int:
        """Prompts that wait for a thread that encodes them."""
        return self._threads.num_waiting

    async def start(self) -> None:
        """Start the engine's thread; where a function loads the model, that goes on beside serving."""
        if isinstance(self._source, LLM):
            await self._begin(self._source)
        else:
            self._loading = asyncio.create_task(self._load(self._source))

    async def loaded(self) -> None:
        """Wait until the model is loaded. Raises the error for which it cannot be."""
        if self._loading is not None:
            await asyncio.shield(self._loading)
        if self._failure is not None:
            raise self._failure

    def begin_stop(self) -> None:
        """Say that the server stops. Requests that run go on; streams without end of their own end now."""
        self._stopping.set()

    async def stopping(self) -> None:
        """Wait until the server begins to stop: what streams without end (events) ends then."""
        await self._stopping.wait()

    async def end_jobs(self) -> None:
        """End all requests; their last pieces say so. Nothing is taken any more."""
        if self._loaded is not None:
            await self._loaded.engine.close()

    async def close(self) -> None:
        """Stop: running requests have `settings.drain_s`, then the model and its tiers are closed."""
        self.begin_stop()
        if self._loading is not None:
            # A thread that loads cannot be stopped; what it loads is to be closed.
            await asyncio.wait([self._loading])
        if self._loaded is not None:
            await self._loaded.engine.close(drain_s=self.settings.drain_s)
            await asyncio.to_thread(self._loaded.llm.close)
        self._threads.close()
        self._compilers.close()

    def generate(self, job: Job, seats: TakenSeats | None = None) -> JobStream:
        """The stream of a job, which is queued when the stream is entered; see JobStream.

        It takes its seats then, from `seats` where it is one of several jobs of a request.
        Raises ApiError 400 when the prompt is longer than is taken, 503 while the model is loading.
        """
        loaded = self._ready()
        if len(job.prompt_ids) > loaded.max_prompt_tokens:
            raise ApiError(
                400,
                f"the prompt has {len(job.prompt_ids)} tokens, but at most {loaded.max_prompt_tokens} are "
                "taken; shorten the prompt",
                code="context_length_exceeded",
            )
        for observer in self.begin_observers:
            observer(job)
        return JobStream(
            job,
            loaded.engine.submit(
                job.prompt_ids,
                job.params,
                job.options,
                outline=job.outline,
                owner=job.tenant.tenant_id,
                explains=job.explain,
            ),
            seats=seats or loaded.seats,
            timeout_s=self.settings.request_timeout_s,
            finished=self._tell,
        )

    async def call(self, work: Callable[[LLM], T]) -> T:
        """Run `work(llm)` between two steps of the engine, on its thread: look-ups, purges, statistics."""
        loaded = self._ready()
        return await loaded.engine.call(lambda _: work(loaded.llm))

    async def in_thread(self, asker: Tenant, work: Callable[[], T]) -> T:
        """Run what takes long but does not touch the engine (rendering, tokenizing) beside the loop.

        Tenants take turns. Raises ApiError 429 when too much is waiting.
        """
        return await self._threads.run(asker, work)

    async def in_compiler(self, asker: Tenant, work: Callable[[], T]) -> T:
        """The same for what may take seconds (grammars): nobody's prompt waits for it."""
        return await self._compilers.run(asker, work)

    async def encode_text(
        self, asker: Tenant, text: str, *, add_special_tokens: bool = True
    ) -> EncodedPrompt:
        """PromptEncoder.encode_text, beside the loop."""
        encode = self.prompts.encode_text
        work = partial(encode, text, add_special_tokens=add_special_tokens)
        return await self.in_thread(asker, work)

    async def encode_chat(
        self,
        asker: Tenant,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> EncodedPrompt:
        """PromptEncoder.encode_chat, beside the loop."""
        encode = partial(
            self.prompts.encode_chat,
            messages,
            tools,
            template_options,
            add_generation_prompt=add_generation_prompt,
        )
        return await self.in_thread(asker, encode)

    async def decode(
        self, asker: Tenant, token_ids: Sequence[int], *, skip_special_tokens: bool = False
    ) -> str:
        """PromptEncoder.decode, beside the loop."""
        decode = self.prompts.decode
        return await self.in_thread(
            asker, partial(decode, token_ids, skip_special_tokens=skip_special_tokens)
        )

    def check_model(self, name: str | None) -> str:
        """The name to answer with for a request's `model`. Raises ApiError 404 for one not served here."""
        names = self.settings.model_names
        if name is None or name == self.model_id:
            return self.model_id
        if name in names or _ANY_MODEL in names:
            return name
        raise ApiError(
            404,
            f"model={name!r:.200} is not served here; ask for {self.model_id!r}, or start the server with "
            "--model-name",
            param="model",
            code="model_not_found",
        )

    async def _load(self, load: Callable[[], LLM]) -> None:
        try:
            await self._begin(await asyncio.to_thread(load))
        except Exception as error:  # noqa: BLE001  whoever waits in `loaded` gets it
            self._failure = error
            # What is ours says all there is to say, and who starts a server says it: see `failure`.
            if not isinstance(error, KVKeepError):
                _log.error("%s cannot be loaded", self.model_id, exc_info=error)

    async def _begin(self, llm: LLM) -> None:
        loaded = _Loaded(llm, self.settings)
        await loaded.engine.start()
        self._loaded = loaded

    def _ready(self) -> _Loaded:
        if self._loaded is not None:
            return self._loaded
        what = "is loading" if self._failure is None else "could not be loaded"
        raise ApiError(
            503,
            f"the model {what}; try again later",
            code="unavailable",
            headers={"retry-after": "1"},
        )

    def _tell(self, finished: Finished) -> None:
        for observer in self.observers:
            try:
                observer(finished)
            except Exception:  # noqa: BLE001  the client has its answer, whatever became of our counting
                _log.exception("an observer of finished jobs failed")


def request_id_of(request: Request) -> str:
    """The id of a request: what the client sent as x-request-id, or one made here."""
    return str(request.state.request_id)


async def _serving(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


# A parameter of routes: the service behind them.
Serving = Annotated[Service, Depends(_serving)]
