"""The tenants whose blocks are apart from others', by the ids with which an administrator names them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from kvkeep.server.auth import Tenant, TenantId
from kvkeep.server.errors import ApiError
from kvkeep.server.jobs import Finished, Job
from kvkeep.spec import BlockKey

__all__ = ["Tenants", "Tokens"]

# Salts that one tenant's clients have made up, of which the last used are known.
_MOST_SALTS = 4096


@dataclass(frozen=True, slots=True)
class Tokens:
    """Prompt tokens of a tenant's requests since the start."""

    reused: int = 0
    computed: int = 0


@dataclass(slots=True)
class _Known:
    """A tenant, and the salts of its clients with their namespaces, the longest unused first."""

    tenant: Tenant
    salts: dict[str, BlockKey] = field(default_factory=dict)
    tokens: Tokens = Tokens()


class Tenants:
    """Ids, salts and namespaces of tenants; there are none where keys are not set, or share.

    Which salts clients use is learned from their requests when these begin, and not remembered over a
    restart. `root_of` gives the namespace of a salt, once the model is there.
    """

    def __init__(self, tenants: Iterable[Tenant], root_of: Callable[[str], BlockKey]) -> None:
        self._root_of = root_of
        self._salt_to_known: dict[str | None, _Known] = {
            one.salt: _Known(one) for one in tenants if one.salt is not None
        }
        self._root_to_id: dict[BlockKey, TenantId] = {}

    def __bool__(self) -> bool:
        return bool(self._salt_to_known)

    def get(self, tenant_id: str) -> Tenant:
        """The tenant of this id. Raises ApiError 404 where there is none."""
        for known in self._salt_to_known.values():
            if known.tenant.tenant_id == tenant_id:
                return known.tenant
        raise ApiError(
            404,
            f"there is no tenant {tenant_id!r:.80}; lists of entries and sessions show their ids",
            param="tenant",
            code="unknown",
        )

    def salts_of(self, tenant: Tenant) -> tuple[str | None, ...]:
        """The salts of a tenant's blocks: its own, and those of its clients since the start."""
        known = self._salt_to_known.get(tenant.salt)
        return (tenant.salt,) if known is None else (tenant.salt, *known.salts)

    def name_of_salt(self, salt: str | None) -> TenantId | None:
        """Whose salt it is; None for one that is not known."""
        return None if salt is None else self.name_of(self._root_of(salt))

    def name_of(self, namespace: BlockKey) -> TenantId | None:
        """Whose namespace it is; None for one that is not known."""
        if not self._root_to_id:
            for known in self._salt_to_known.values():
                assert known.tenant.salt is not None
                self._root_to_id[self._root_of(known.tenant.salt)] = known.tenant.tenant_id
        return self._root_to_id.get(namespace)

    def tokens_of(self, tenant: Tenant) -> Tokens:
        """What a tenant's requests have reused and computed."""
        known = self._salt_to_known.get(tenant.salt)
        return Tokens() if known is None else known.tokens

    def learn(self, tenant: Tenant, salt: str | None) -> None:
        """Take it that a tenant has blocks under a salt, or is about to."""
        known = self._salt_to_known.get(tenant.salt)
        if known is not None and salt is not None and salt not in self._salt_to_known:
            self._learn(known, salt)

    def begin(self, job: Job) -> None:
        """Take a job that begins: an observer of the service. An erasure meanwhile is about it as well."""
        self.learn(job.tenant, job.options.salt)

    def observe(self, finished: Finished) -> None:
        """Take a job that has ended: an observer of the service."""
        known = self._salt_to_known.get(finished.job.tenant.salt)
        if known is None:
            return
        receipt = finished.receipt
        if receipt is not None:
            known.tokens = Tokens(
                known.tokens.reused + receipt.reused_tokens,
                known.tokens.computed + receipt.computed_tokens,
            )
        self.learn(finished.job.tenant, finished.job.options.salt)

    def _learn(self, known: _Known, salt: str) -> None:
        root = known.salts.pop(salt, None) or self._root_of(salt)
        known.salts[salt] = root
        self.name_of(root)  # the tenants' own come first
        self._root_to_id[root] = known.tenant.tenant_id
        if len(known.salts) > _MOST_SALTS:
            oldest = next(iter(known.salts))
            del self._root_to_id[known.salts.pop(oldest)]
