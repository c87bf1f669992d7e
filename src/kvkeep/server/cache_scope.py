"""Whose part of the cache somebody may see and change over HTTP."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

from fastapi import Depends, Query

from kvkeep.cache import PinReport
from kvkeep.config.server import ServerSettings
from kvkeep.server.auth import Admin, Asker, Tenant, TenantId
from kvkeep.server.cache_state import Kept
from kvkeep.server.errors import ApiError
from kvkeep.server.service import Serving
from kvkeep.server.tenants import Tenants
from kvkeep.spec import BlockKey

__all__ = [
    "AdminScope",
    "AskerScope",
    "Scope",
    "check_pins",
    "named_scope",
    "pin_prefix",
    "scope_of",
]

_TenantId = Annotated[
    str | None, Query(description="with the admin key: what this tenant has, by its id")
]


@dataclass(frozen=True, slots=True)
class Scope:
    """The part of the cache that a request is about.

    Who has an admin key, or needs none, may mean everybody's blocks (`sees_all`) by giving no salt, and those
    of any salt by giving it; or what one tenant has, by its id (`is_named`). All others mean their own,
    whatever they give, the salts of its clients included. `tenants` are there for who may know of them;
    `salts_of` knows the salts of a tenant.
    """

    tenant: Tenant
    sees_all: bool
    tenants: Tenants | None = None
    is_named: bool = False
    salts_of: Callable[[Tenant], tuple[str | None, ...]] | None = None

    @property
    def owner(self) -> TenantId | None:
        """The tenant that it is about; None for everybody's."""
        return None if self.sees_all else self.tenant.tenant_id

    def salt(self, asked: str | None) -> str | None:
        """The salt of prompts: that of requests which this tenant sends with salt `asked`."""
        return self.tenant.salt_for(asked)

    def salts(self, asked: str | None) -> tuple[str | None, ...]:
        """The salts whose blocks are meant; none means those of all."""
        if self.sees_all:
            return () if asked is None else (asked,)
        if asked is None and self.salts_of is not None:
            return self.salts_of(self.tenant)
        return (self.salt(asked),)

    def named(self, fields: dict[str, Any], namespace: BlockKey) -> dict[str, Any]:
        """Fields with the id of the tenant that the namespace is of, for who may know it."""
        if not self.tenants:
            return fields
        return fields | {"tenant": self.tenants.name_of(namespace)}

    def named_by_salt(self, fields: dict[str, Any], salt: str | None) -> dict[str, Any]:
        """The same, by the salt that the namespace is of."""
        return fields | {"tenant": self.tenants.name_of_salt(salt)} if self.tenants else fields

    def pin_name(self, name: str) -> str:
        """The name of a pin in the cache: names of tenants must not meet."""
        return name if self._names_pins else pin_prefix(self.tenant) + name

    def own_pin(self, report: PinReport) -> str | None:
        """What a tenant calls a pin of the cache; None for one that is not its own."""
        if self.is_named and self.tenants is not None:
            is_own = self.tenants.name_of(report.namespace) == self.tenant.tenant_id
            return report.name if is_own else None
        prefix = "" if self.sees_all else pin_prefix(self.tenant)
        return report.name.removeprefix(prefix) if report.name.startswith(prefix) else None

    @property
    def _names_pins(self) -> bool:
        return self.sees_all or self.is_named


def pin_prefix(tenant: Tenant) -> str:
    """What names of a tenant's own pins begin with in the cache."""
    return f"{tenant.tenant_id}/"


def check_pins(scope: Scope, param: str) -> None:
    """Raise ApiError 403 for who may not pin: what is pinned takes room from everybody."""
    if not scope.tenant.is_admin:
        raise ApiError(403, "pins need the admin key; leave pin out, and give a ttl", param=param)


def scope_of(tenant: Tenant, settings: ServerSettings, tenants: Tenants | None = None) -> Scope:
    """What a tenant may mean: everything only when no other tenant has the same rights."""
    has_admin_key = settings.admin_key is not None
    sees_all = tenant.is_admin and (has_admin_key or tenant.salt is None)
    return Scope(
        tenant,
        sees_all,
        tenants=tenants if sees_all else None,
        salts_of=None if tenants is None else tenants.salts_of,
    )


def named_scope(scope: Scope, tenant_id: str | None) -> Scope:
    """The scope of the tenant of this id, if one is given.

    Raises ApiError 403 for who may not name tenants, whether or not there is such a one, else 404 for an
    unknown one.
    """
    if tenant_id is None or (scope.is_named and tenant_id == scope.tenant.tenant_id):
        return scope
    if not scope.sees_all or scope.tenants is None:
        raise ApiError(
            403, "tenants are named with the admin key; leave tenant out", param="tenant"
        )
    tenant = replace(scope.tenants.get(tenant_id), is_admin=True)
    return replace(scope, tenant=tenant, sees_all=False, is_named=True)


async def _of_admin(asker: Admin, service: Serving, kept: Kept, tenant: _TenantId = None) -> Scope:
    return named_scope(scope_of(asker, service.settings, kept.tenants), tenant)


async def _of_asker(asker: Asker, service: Serving, kept: Kept, tenant: _TenantId = None) -> Scope:
    return named_scope(scope_of(asker, service.settings, kept.tenants), tenant)


AdminScope = Annotated[Scope, Depends(_of_admin)]
AskerScope = Annotated[Scope, Depends(_of_asker)]
