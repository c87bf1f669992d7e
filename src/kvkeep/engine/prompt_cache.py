"""The cache as the user of an LLM sees it: by token ids, salts, tags and names."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from kvkeep.cache import (
    BlockReport,
    CacheStats,
    DropReceipt,
    PinId,
    PinReport,
    Purge,
    PurgeReceipt,
    Query,
    QuotaReport,
    Receipt,
    Selector,
    SessionId,
    SessionReport,
    VerifyReport,
)
from kvkeep.cache.administration import Administration
from kvkeep.cache.quotas import Share
from kvkeep.config import CacheOptions, parse_bytes, parse_duration
from kvkeep.config.cache_options import check_name
from kvkeep.engine.engine import Engine
from kvkeep.engine.portable import (
    ExportReceipt,
    ImportReceipt,
    export_chains,
    import_chains,
)
from kvkeep.errors import RequestError
from kvkeep.planning import Coverage
from kvkeep.spec import BlockKey

__all__ = ["PromptCache"]

# Serves a prompt without output, to its end.
Compute = Callable[[Sequence[int], CacheOptions], Receipt]


class PromptCache:
    """Questions and orders about what an engine's cache holds; for the thread that owns the engine.

    Sessions are of a tenant: with `salt` that of the requests, else None.
    """

    def __init__(self, engine: Engine, compute: Compute | None = None) -> None:
        self._engine = engine
        self._compute = compute
        self._quotas: dict[tuple[str, str | None], int] = {}

    def coverage(self, token_ids: Sequence[int], *, salt: str | None = None) -> Coverage:
        """Which runs of the tokens are known, and where. Changes nothing."""
        return self._engine.cache.coverage(self._engine.chain(token_ids, salt))

    def drop(
        self, token_ids: Sequence[int], blocks: Iterable[int], *, salt: str | None = None
    ) -> DropReceipt:
        """Forget these block numbers of this chain everywhere; the next request computes just them.

        Raises RequestError for a number that is not one of the chain's full blocks.
        """
        chain, numbers = self._engine.chain(token_ids, salt), list(blocks)
        for number in numbers:
            if not 0 <= number < len(chain.keys):
                raise RequestError(
                    f"blocks has {number}, but {len(chain)} tokens have full blocks 0 to "
                    f"{len(chain.keys) - 1} (block_size={chain.block_size}); give numbers of these"
                )
        return self._engine.cache.drop(chain, numbers)

    def clear(self, *, tiers: bool = False) -> DropReceipt:
        """Forget everything on the device; running requests keep what they hold as their own.

        With `tiers` also all that is in the tiers, whoever put it there.
        """
        return self._engine.cache.clear(tiers=tiers)

    # --- lifetimes -------------------------------------------------------------------------------

    def purge(self, selector: Selector, *, dry_run: bool = False) -> PurgeReceipt:
        """Forget what a selector means, everywhere, and wait for it; with `dry_run` count it only.

        Requests that run with such a tag, session or salt publish nothing any more.
        """
        return self._admin.purges.purge(self._resolve(selector), dry_run=dry_run)

    def begin_purge(self, selector: Selector) -> Purge:
        """The same without waiting for tiers to delete: nothing of it is served from now on."""
        return self._admin.purges.begin(self._resolve(selector))

    def keys(self, token_ids: Sequence[int], *, salt: str | None = None) -> tuple[BlockKey, ...]:
        """The keys of a prompt's full blocks, for a Selector."""
        return tuple(self._engine.chain(token_ids, salt).keys)

    def expire(self) -> PurgeReceipt:
        """Forget now what has expired; otherwise it is forgotten between steps."""
        return self._admin.purges.expire()

    def erase(self, salt: str) -> PurgeReceipt:
        """Forget all of a tenant, pinned or not; its running requests publish nothing any more."""
        receipt = self.purge(Selector(salts=(salt,), include_pinned=True))
        root = self._root(salt)
        for session in self._admin.sessions():
            if session.namespace == root:
                self._admin.close_session(SessionId(root, session.name))
        for pin in self._admin.pins():
            if pin.namespace == root:
                self._admin.unpin(pin.name)
        return receipt

    def entries(
        self, selector: Selector, *, limit: int = 100, after: BlockKey | None = None
    ) -> list[BlockReport]:
        """Blocks that a selector means, the last used first; `after` continues an earlier list."""
        return self._admin.blocks(self._resolve(selector), limit=limit, after=after)

    # --- sessions --------------------------------------------------------------------------------

    def close_session(self, name: str, *, salt: str | None = None) -> PurgeReceipt:
        """End a session: blocks that only it uses are forgotten everywhere. An unknown one has none."""
        return self._admin.close_session(self._session_id(name, salt))

    def sessions(self) -> list[SessionReport]:
        """All sessions of all tenants, the longest unused first."""
        return self._admin.sessions()

    def session(self, name: str, *, salt: str | None = None) -> SessionReport:
        """One session. Raises RequestError where there is none of that name."""
        return self._admin.session(self._session_id(name, salt))

    def fork_session(self, name: str, new_name: str, *, salt: str | None = None) -> SessionReport:
        """Begin a session that uses all blocks of another: closing either leaves them to the other."""
        child = self._session_id(new_name, salt)
        self._admin.fork_session(self._session_id(name, salt), child)
        return self._admin.session(child)

    def change_session(
        self, name: str, *, ttl: float | str, salt: str | None = None
    ) -> SessionReport:
        """Let a session end `ttl` (seconds, "30m", "never") after its last use, of which this is one.

        After a restart it is `session_ttl` again. Raises RequestError where there is no such session.
        """
        ttl_s = parse_duration("ttl", ttl)
        return self._admin.change_session(self._session_id(name, salt), ttl_s)

    def export_session(
        self, path: str | Path, name: str, *, salt: str | None = None
    ) -> ExportReceipt:
        """Write the last conversation of a session to a file.

        Raises RequestError for a session that is unknown, or was not used since the start.
        """
        session_id = self._session_id(name, salt)
        self._admin.session(session_id)
        session = self._engine.cache.lifetimes.sessions.get(session_id)
        if session is None or session.chain is None:
            raise RequestError(
                f"session={name!r} was not used since the start; its tokens are not known"
            )
        return export_chains(self._engine.installed, [session.chain], path)

    # --- pins, warm starts, quotas ---------------------------------------------------------------

    def pin(self, token_ids: Sequence[int], *, name: str, salt: str | None = None) -> PinReport:
        """Keep the known full blocks of a prompt until `unpin`; the name may be used for several.

        Raises CapacityError where pins would keep more than they may, RequestError where nothing is known.
        """
        check_name("name", name)
        return self._admin.pin(PinId(name), self._engine.chain(token_ids, salt))

    def unpin(self, name: str) -> PinReport:
        """End a pin; what it was when it ended. Raises RequestError for an unknown name."""
        return self._admin.unpin(PinId(name))

    def pins(self) -> list[PinReport]:
        """All pins, by name."""
        return self._admin.pins()

    def warm(self, token_ids: Sequence[int], options: CacheOptions | None = None) -> Receipt:
        """Compute a prompt that is to be asked later, with the life that `options` give it.

        Raises RequestError where requests are not run by an LLM; send one with max_tokens=0 there.
        """
        if self._compute is None:
            raise RequestError("warm needs an LLM; submit a request with max_tokens=0 instead")
        return self._compute(token_ids, options or CacheOptions())

    def set_quota(
        self, salt: str, limit: int | str | None, *, tier: str | None = None
    ) -> QuotaReport | None:
        """Limit what a tenant's blocks may take: bytes, "2GB", or None for no limit.

        In `tier`, "device" or a tier of this machine; without it anywhere, where each block counts once. What
        is too much goes when a request ends, and when blocks move: the least useful of this tenant, in that
        place. Raises RequestError for another tier.
        """
        total = self._engine.cache.stats().capacity_bytes
        num_bytes = None if limit is None else parse_bytes(limit, total_bytes=total, field="limit")
        self._admin.set_quota(Share(self._root(salt), tier), num_bytes)
        if num_bytes is None:
            self._quotas.pop((salt, tier), None)
            return None
        self._quotas[salt, tier] = num_bytes
        return self._quota(salt, tier)

    def quotas(self) -> list[QuotaReport]:
        """All quotas, and what is used of them."""
        shares = sorted(self._quotas, key=lambda share: (share[0], share[1] or ""))
        return [self._quota(salt, tier) for salt, tier in shares]

    # --- the rest --------------------------------------------------------------------------------

    def offload(self) -> int:
        """Move what no request uses down to the tiers now; returns the blocks that left the device."""
        return self._engine.cache.offload()

    def export(
        self, path: str | Path, prompts: Sequence[Sequence[int]], *, salt: str | None = None
    ) -> ExportReceipt:
        """Write what is known of these prompts' tokens to one file: see docs/formats.md."""
        chains = [self._engine.chain(prompt, salt) for prompt in prompts]
        if not chains:
            raise RequestError("prompts is empty; give the token ids of at least one")
        return export_chains(self._engine.installed, chains, path)

    def import_(self, path: str | Path, *, salt: str | None = None) -> ImportReceipt:
        """Enter the blocks of an exported file. Raises RequestError where they are not this model's."""
        root = self._engine.namespace(salt).root_key()
        return import_chains(self._engine.installed, root, path)

    def verify(self, *, tiers: bool = False) -> VerifyReport:
        """Check every invariant of the bookkeeping; with `tiers` read all they have. Changes nothing."""
        return self._engine.cache.verify(tiers=tiers)

    def stats(self) -> CacheStats:
        """Bytes and blocks in use, reusable and free."""
        return self._engine.cache.stats()

    @property
    def _admin(self) -> Administration:
        return self._engine.cache.administration

    def _root(self, salt: str | None) -> BlockKey:
        return self._engine.namespace(salt).root_key()

    def _session_id(self, name: str, salt: str | None) -> SessionId:
        check_name("session", name)
        return SessionId(self._root(salt), name)

    def _resolve(self, selector: Selector) -> Query:
        return selector.resolve(self._root, self._engine.cache.lifetimes.clock())

    def _quota(self, salt: str, tier: str | None) -> QuotaReport:
        used = self._admin.used_bytes(Share(self._root(salt), tier))
        limit = self._quotas[salt, tier]
        return QuotaReport(salt=salt, limit_bytes=limit, used_bytes=used, tier=tier)
