"""Many requests over one model: plan, run, commit, sample.

Synchronous, and owned by one thread. Asking for work is `add`; doing it is `step`.
"""

import logging
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
from kvkeep.engine.mishaps import outliving
from kvkeep.engine.outputs import FinishReason, Piece
from kvkeep.engine.sampler import InvalidLogitsError, Sampled, Sampler
from kvkeep.engine.step_costs import StepCosts
from kvkeep.errors import CapacityError, RequestError
from kvkeep.hf.install import InstalledModel
from kvkeep.hf.paged_model import Work
from kvkeep.scheduling import PlannedWork, Request, Scheduler
from kvkeep.spec import RequestId

__all__ = ["Engine"]

_log = logging.getLogger(__name__)
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
        request_id = RequestId(next(self._ids))
        request = Request(request_id, chain, params, options)
        first = OutputStream(request, 0, list(prompt_ids), self._tokenizer, self._end)
        generation = Generation(request_id, first)
        sent = Sent(
            namespace=self.namespace(options.salt),
            chain=chain,
            outline=outline or Outline(),
            session=options.session,
            owner=owner,
            reads=options.read,
        )
        # Last of all that can fail: from here on the claim ends with the request.
        request.claim = self.cache.open_claim(options, chain)
        try:
            request.lookup = self.cache.look_up(chain) if options.read else None
        except BaseException:
            self.cache.close_claim(request.claim)
            raise
        self._generations[request_id] = generation
        self._request_to_output[request] = (generation, first)
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
        go on with the others; the last pieces of those that ended come with the next step. What fails behind
        the model ends only the output that it belongs to, and is logged.
        """
        self.cache.poll(is_busy=self.num_running > 0)
        plan = self._scheduler.plan()
        if not plan.work and self._generations:
            self.cache.wait(_WAIT_FOR_MOVES_S)
        if plan.work:
            self.num_steps += 1
            try:
                logits_RV = self._run(plan.work)
                self._explain(plan.work)
                self._commit(plan.work)
                self._advance(plan.work, logits_RV)
            except BaseException:
                # How far the step came is unknown, also when it was interrupted.
                for work in plan.work:
                    self._fail_prompt(work.request)
                raise
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
            with outliving("explaining a miss"):
                miss = self._explaining.explain(item.request)
                if miss is not None:
                    self._request_to_output[item.request][0].miss = miss

    def _commit(self, planned: Sequence[PlannedWork]) -> None:
        for item in planned:
            try:
                self.cache.commit(item.request.held_lease(), item.spans)
            except Exception:  # noqa: BLE001  it ends this prompt alone
                _log.exception("what request %d computed is lost", item.request.request_id)
                self._fail_prompt(item.request)

    def _advance(self, planned: Sequence[PlannedWork], logits_RV: Tensor) -> None:
        """Choose the next token of every request that has computed all it knew and has not failed."""
        rows: list[int] = []
        outputs: list[tuple[Generation, OutputStream]] = []
        for item in planned:
            if item.is_last and not _wants_logits(item) and item.request in self._request_to_output:
                generation, output = self._request_to_output[item.request]
                self._pieces.append(self._finish(generation, output, FinishReason.LENGTH))
        for row, item in enumerate(filter(_wants_logits, planned)):
            if item.request not in self._request_to_output:
                continue
            generation, output = self._request_to_output[item.request]
            try:
                siblings = self._fork(generation) if output is generation.outputs[0] else []
            except Exception:  # noqa: BLE001  it ends this prompt alone
                _log.exception("request %d cannot be forked", item.request.request_id)
                self._fail_prompt(item.request)
                continue
            for one in [output, *siblings]:
                rows.append(row)
                outputs.append((generation, one))
        if outputs:
            is_each_once = rows == list(range(logits_RV.shape[0]))
            self._choose(outputs, logits_RV if is_each_once else logits_RV[rows])

    def _choose(
        self, outputs: Sequence[tuple[Generation, OutputStream]], logits_BV: Tensor
    ) -> None:
        try:
            sampled = self._sampler.sample(logits_BV, [output.row for _, output in outputs])
        except InvalidLogitsError as error:
            bad = set(error.rows)
            for at in error.rows:
                self._pieces.append(self._finish(*outputs[at], FinishReason.ERROR))
            good = [at for at in range(len(outputs)) if at not in bad]
            if good:
                self._choose([outputs[at] for at in good], logits_BV[good])
        except Exception:  # noqa: BLE001  it ends those that are to blame
            if len(outputs) == 1:
                self._fail(*outputs[0])
                return
            # No choice depends on the others: one by one, only those that are to blame fail.
            for at, one in enumerate(outputs):
                self._choose([one], logits_BV[at : at + 1])
        else:
            for (generation, output), one_sampled in zip(outputs, sampled, strict=True):
                self._accept(generation, output, one_sampled)

    def _accept(self, generation: Generation, output: OutputStream, sampled: Sampled) -> None:
        try:
            text = output.accept(sampled)
            output.request.held_lease().append([sampled.token_id])
        except Exception:  # noqa: BLE001  it ends this output alone
            self._fail(generation, output)
            return
        if output.finish_reason is not None:
            self._close(generation, output)
        self._pieces.append(generation.piece(output, [sampled], text))

    def _fail(self, generation: Generation, output: OutputStream) -> None:
        """End an output whose next token could not be chosen, or not be taken."""
        _log.exception("output %d of request %d fails", output.choice, generation.request_id)
        self._pieces.append(self._finish(generation, output, FinishReason.ERROR))

    def _fail_prompt(self, request: Request) -> None:
        """End all outputs of a prompt, of which this request is one; nothing where that is done."""
        if request in self._request_to_output:
            generation, _ = self._request_to_output[request]
            self._pieces += self._end_all(generation, FinishReason.ERROR)

    def _end_all(self, generation: Generation, reason: FinishReason) -> list[Piece]:
        """End every output that runs; those not forked yet are never begun."""
        generation.num_expected = len(generation.outputs)
        running = [output for output in generation.outputs if output.finish_reason is None]
        return [self._finish(generation, output, reason) for output in running]

    def _finish(self, generation: Generation, output: OutputStream, reason: FinishReason) -> Piece:
        text = ""
        with outliving("giving out the last text"):
            text = output.finish(reason)
        self._close(generation, output)
        return generation.piece(output, [], text)

    def _close(self, generation: Generation, output: OutputStream) -> None:
        """Give back all that an output holds; whatever fails of that, its last piece comes."""
        request, lease, num_computed = output.request, output.request.lease, None
        # Beside the last token of an answer, which is never computed.
        if lease is not None and not lease.loads and lease.num_pending <= 1:
            num_computed = len(lease.chain) - lease.num_pending
        del self._request_to_output[request]
        with outliving("giving blocks back"):
            self._scheduler.finish(request)
        if self._explaining.is_asked(request):
            with outliving("finding when a prompt expires"):
                prompt = request.chain.keys[: request.num_prompt // request.chain.block_size]
                generation.expires_at = self.cache.lifetimes.register.first_end(prompt)
        with outliving("remembering a prompt"):
            self._explaining.finish(request, num_computed)
        if generation.is_finished:
            self._close_prompt(generation)

    def _close_prompt(self, generation: Generation) -> None:
        del self._generations[generation.request_id]
        first = generation.outputs[0].request
        with outliving("measuring what was saved"):
            generation.saved_s = self._costs.saved_s(first)
        if first.claim is not None:
            with outliving("closing a claim"):
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
            output = OutputStream(
                request, choice, prompt_ids, self._tokenizer, self._end, first=first
            )
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
