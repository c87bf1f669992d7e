"""Many requests over one model: plan, run, commit, sample.

Synchronous, and owned by one thread. Asking for work is `add`; doing it is `step`.
"""

from collections.abc import Collection, Sequence
from itertools import count
from time import perf_counter

from torch import Tensor

from kvkeep.blocks import Namespace, TokenChain
from kvkeep.cache.explain import History, Outline, Sent
from kvkeep.config import CacheOptions, EngineSettings, SamplingParams
from kvkeep.engine.calibrate import calibrate, keep_calibration
from kvkeep.engine.detokenizer import TokenDecoder
from kvkeep.engine.explaining import Explaining
from kvkeep.engine.generation import EndTokens, Generation, OutputStream
from kvkeep.engine.outputs import FinishReason, Piece
from kvkeep.engine.sampler import InvalidLogitsError, Sampled, Sampler
from kvkeep.engine.step_costs import StepCosts
from kvkeep.errors import CapacityError, RequestError
from kvkeep.hf.install import InstalledModel
from kvkeep.hf.paged_model import Work
from kvkeep.scheduling import PlannedWork, Request, Scheduler
from kvkeep.spec import RequestId

__all__ = ["Engine"]

# With nothing to compute, a step waits so long for blocks that are on their way.
_WAIT_FOR_MOVES_S = 0.05


class Engine:
    """Serves requests by continuous batching; see Scheduler for who runs when."""

    def __init__(
        self,
        installed: InstalledModel,
        settings: EngineSettings,
        *,
        tokenizer: TokenDecoder | None = None,
        eos_ids: Collection[int] = (),
    ) -> None:
        self.installed = installed
        self.cache = installed.cache
        self.settings = settings
        self._tokenizer = tokenizer
        self._end = EndTokens(frozenset(eos_ids), installed.max_context)
        self._sampler = Sampler()
        self._scheduler = Scheduler(
            self.cache,
            max_batch_tokens=settings.max_batch_tokens,
            max_requests=settings.max_requests,
        )
        self._explaining = Explaining(self.cache)
        self._ids = count()
        self._generations: dict[RequestId, Generation] = {}
        self._request_to_output: dict[Request, tuple[Generation, OutputStream]] = {}
        self._pieces: list[Piece] = []
        self.num_steps = 0
        if installed.chooser is not None:
            installed.chooser.start_from(calibrate(installed, settings.calibration_folder))
        self._costs = StepCosts(installed.chooser, step_tokens=settings.max_batch_tokens)

    @property
    def history(self) -> History:
        """What was sent and given up lately, for questions about prompts that were not sent."""
        return self._explaining.history

    @property
    def has_work(self) -> bool:
        """Whether some request is not finished, or its last piece not given out."""
        return bool(self._generations or self._pieces)

    @property
    def num_waiting(self) -> int:
        """Requests without a seat."""
        return self._scheduler.num_waiting

    @property
    def num_running(self) -> int:
        """Requests that hold blocks; one with n outputs counts n times."""
        return self._scheduler.num_running

    @property
    def is_waiting(self) -> bool:
        """Whether blocks are on their way, so that a step may have nothing to compute yet."""
        return self.cache.is_moving

    def chain(self, token_ids: Sequence[int], salt: str | None = None) -> TokenChain:
        """The token chain of a prompt in this model's namespace."""
        return TokenChain(self.namespace(salt).root_key(), self.settings.block_size, token_ids)

    def namespace(self, salt: str | None) -> Namespace:
        """Who shares blocks with requests of this salt."""
        own = self.installed.namespace
        return Namespace(
            model=own.model,
            positions=own.positions,
            kv_format=own.kv_format,
            block_size=own.block_size,
            salt=salt or "",
        )

    def add(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        options: CacheOptions,
        *,
        outline: Outline | None = None,
        owner: str | None = None,
        explains: bool = False,
    ) -> RequestId:
        """Queue a prompt. With `explains` its receipt says why it missed: see kvkeep.cache.explain.

        `outline` is what it is made of. `owner` is the tenant, who is told of its prompts under other salts
        too.
        Raises RequestError for one that is malformed, CapacityError for one too big, PinCapacityError for a
        pin too many.
        """
        chain = self.chain(prompt_ids, options.salt)
        self._refuse_misfits(chain, params)
        claim = self.cache.open_claim(options, chain)
        request_id = RequestId(next(self._ids))
        request = Request(request_id, chain, params, options, claim)
        if options.read:
            request.lookup = self.cache.look_up(chain)
        first = OutputStream(request, 0, list(prompt_ids), self._tokenizer, self._end)
        generation = Generation(request_id, first)
        self._generations[request_id] = generation
        self._request_to_output[request] = (generation, first)
        sent = Sent(
            namespace=self.namespace(options.salt),
            chain=chain,
            outline=outline or Outline(),
            session=options.session,
            owner=owner,
            reads=options.read,
        )
        self._explaining.add(request, sent, is_wanted=explains)
        self._scheduler.add(request)
        return request_id

    def abort(self, request_id: RequestId) -> list[Piece]:
        """End a request; its finished blocks stay cached. Unknown or finished ids give no piece."""
        generation = self._generations.get(request_id)
        if generation is None:
            return []
        return self._end_all(generation, FinishReason.ABORT)

    def step(self) -> list[Piece]:
        """Compute one batch of spans; returns what it added to each output.

        When the model fails, the requests of the batch are ended and its error is passed on. The engine can
        go on with the others; the last pieces of those that ended come with the next step.
        """
        self.cache.poll(is_busy=self.num_running > 0)
        plan = self._scheduler.plan()
        if not plan.work and self._generations:
            self.cache.wait(_WAIT_FOR_MOVES_S)
        if plan.work:
            self.num_steps += 1
            try:
                logits_RV = self._run(plan.work)
            except BaseException:
                # How far the step came is unknown, also when it was interrupted.
                failed = {self._request_to_output[work.request][0]: None for work in plan.work}
                for generation in failed:
                    self._pieces += self._end_all(generation, FinishReason.ERROR)
                raise
            self._explain(plan.work)
            for work in plan.work:
                self.cache.commit(work.request.held_lease(), work.spans)
            self._pieces += self._advance(plan.work, logits_RV)
        pieces, self._pieces = self._pieces, []
        return pieces

    def close(self) -> None:
        """End all requests, write to the tiers what is to survive, and close them."""
        for generation in list(self._generations.values()):
            self._end_all(generation, FinishReason.ABORT)
        if self.installed.chooser is not None:
            keep_calibration(self.installed, self.settings.calibration_folder)
        self.cache.close()

    def _run(self, planned: Sequence[PlannedWork]) -> Tensor:
        work = [
            Work(item.request.held_lease(), item.spans, wants_logits=_wants_logits(item))
            for item in planned
        ]
        for item in planned:
            self._request_to_output[item.request][0].begin_step()
        began_s = perf_counter()
        logits_RV = self.installed.paged.forward(work)
        spans = [span for item in planned for span in item.spans]
        self._costs.observe(spans, perf_counter() - began_s)
        return logits_RV

    def _explain(self, planned: Sequence[PlannedWork]) -> None:
        """Say to those that asked why they compute what they do, once that is known."""
        for item in planned:
            miss = self._explaining.explain(item.request)
            if miss is not None:
                self._request_to_output[item.request][0].miss = miss

    def _advance(self, planned: Sequence[PlannedWork], logits_RV: Tensor) -> list[Piece]:
        """Choose the next token of every request that has computed all it knew."""
        pieces: list[Piece] = []
        rows: list[int] = []
        outputs: list[tuple[Generation, OutputStream]] = []
        wanting = [item for item in planned if _wants_logits(item)]
        for item in planned:
            if item.is_last and item.request.params.max_tokens == 0:
                generation, output = self._request_to_output[item.request]
                pieces.append(self._finish(generation, output, FinishReason.LENGTH))
        for row, item in enumerate(wanting):
            generation, output = self._request_to_output[item.request]
            siblings = self._fork(generation) if output is generation.outputs[0] else []
            for one in [output, *siblings]:
                rows.append(row)
                outputs.append((generation, one))
        if not outputs:
            return pieces
        logits_BV = logits_RV if len(rows) == logits_RV.shape[0] else logits_RV[rows]
        return pieces + self._choose(outputs, logits_BV)

    def _choose(
        self, outputs: Sequence[tuple[Generation, OutputStream]], logits_BV: Tensor
    ) -> list[Piece]:
        try:
            sampled = self._sampler.sample(logits_BV, [output.row for _, output in outputs])
        except InvalidLogitsError as error:
            bad = set(error.rows)
            pieces = [self._finish(*outputs[at], FinishReason.ERROR) for at in error.rows]
            good = [at for at in range(len(outputs)) if at not in bad]
            rest = [outputs[at] for at in good]
            return pieces + (self._choose(rest, logits_BV[good]) if rest else [])
        return [
            self._accept(generation, output, one)
            for (generation, output), one in zip(outputs, sampled, strict=True)
        ]

    def _accept(self, generation: Generation, output: OutputStream, sampled: Sampled) -> Piece:
        text = output.accept(sampled)
        output.request.held_lease().append([sampled.token_id])
        if output.finish_reason is not None:
            self._close(generation, output)
        return generation.piece(output, [sampled], text)

    def _end_all(self, generation: Generation, reason: FinishReason) -> list[Piece]:
        """End every output that runs; those not forked yet are never begun."""
        generation.num_expected = len(generation.outputs)
        running = [output for output in generation.outputs if output.finish_reason is None]
        return [self._finish(generation, output, reason) for output in running]

    def _finish(self, generation: Generation, output: OutputStream, reason: FinishReason) -> Piece:
        text = output.finish(reason)
        self._close(generation, output)
        return generation.piece(output, [], text)

    def _close(self, generation: Generation, output: OutputStream) -> None:
        lease = output.request.lease
        num_computed = None
        # Beside the last token of an answer, which is never computed.
        if lease is not None and not lease.loads and lease.num_pending <= 1:
            num_computed = len(lease.chain) - lease.num_pending
        self._scheduler.finish(output.request)
        if self._explaining.is_asked(output.request):
            chain, num_prompt = output.request.chain, output.request.num_prompt
            prompt = chain.keys[: num_prompt // chain.block_size]
            generation.expires_at = self.cache.lifetimes.register.first_end(prompt)
        self._explaining.finish(output.request, num_computed)
        del self._request_to_output[output.request]
        if generation.is_finished:
            del self._generations[generation.request_id]
            first = generation.outputs[0].request
            generation.saved_s = self._costs.saved_s(first)
            if first.claim is not None:
                self.cache.close_claim(first.claim, first.chain)

    def _fork(self, generation: Generation) -> list[OutputStream]:
        """Outputs 2 to n, once the prompt is computed: they share its blocks, and its logits if they fit.

        One for which there is no seat or no room waits in the queue and finds the prompt in the cache.
        """
        first = generation.outputs[0]
        forked = []
        for choice in range(len(generation.outputs), generation.num_expected):
            lease = None
            if self._scheduler.has_seat(first.request):
                lease = self.cache.fork(first.request.held_lease())
            chain = lease.chain if lease else first.request.chain.fork()
            request = Request(
                RequestId(next(self._ids)),
                chain,
                generation.params,
                first.request.options,
                first.request.claim,
                origin=first.request.origin,
            )
            prompt_ids = chain.tokens(0, first.request.num_prompt)
            output = OutputStream(request, choice, prompt_ids, self._tokenizer, self._end)
            generation.outputs.append(output)
            self._request_to_output[request] = (generation, output)
            if lease is None:
                self._scheduler.add(request)
            else:
                self._scheduler.add_running(request, lease)
                forked.append(output)
        return forked

    def _refuse_misfits(self, chain: TokenChain, params: SamplingParams) -> None:
        vocabulary = self.installed.vocab_size
        if not len(chain):
            raise RequestError("prompt has 0 tokens; give at least one")
        largest = max(chain.tokens())
        if largest >= vocabulary:
            raise RequestError(
                f"prompt has token id {largest}, but the model knows ids below {vocabulary}; "
                "tokenize it with the model's own tokenizer"
            )
        if len(chain) > self._end.max_context - min(1, params.max_tokens):
            raise RequestError(
                f"prompt has {len(chain)} tokens, but the longest context is {self._end.max_context} with "
                "the output; shorten the prompt"
            )
        longest = min(len(chain) + params.max_tokens, self._end.max_context)
        needed = self.cache.blocks_needed(longest, self.settings.max_batch_tokens)
        for need, have, one in zip(
            needed, self.cache.num_blocks(), self.cache.spec.block_classes, strict=True
        ):
            if need > have:
                raise CapacityError(
                    f"a request of {longest} tokens (prompt {len(chain)}, max_tokens "
                    f"{params.max_tokens}) needs {need} blocks in group {one.name}, which has {have}; "
                    "raise capacity or lower max_tokens"
                )


def _wants_logits(item: PlannedWork) -> bool:
    return item.is_last and item.request.params.max_tokens > 0
