"""Whose part of the cache somebody may see and change over HTTP."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends

from kvkeep.server.auth import Admin, Asker, Tenant
from kvkeep.server.service import Serving
from kvkeep.server.settings import ServerSettings

__all__ = ["AdminScope", "AskerScope", "Scope", "scope_of"]


@dataclass(frozen=True, slots=True)
class Scope:
    """The part of the cache that a request is about.

    Who has an admin key, or needs none, may mean everybody's blocks (`sees_all`) by giving no salt, and those
    of any salt by giving it. All others mean their own, whatever they give.
    """

    tenant: Tenant
    sees_all: bool

    def salt(self, asked: str | None) -> str | None:
        """The salt of prompts: that of requests which this tenant sends with salt `asked`."""
        return self.tenant.salt_for(asked)

    def salts(self, asked: str | None) -> tuple[str | None, ...]:
        """The salts whose blocks are meant; none means those of all."""
        if not self.sees_all:
            return (self.salt(asked),)
        return () if asked is None else (asked,)

    def pin_name(self, name: str) -> str:
        """The name of a pin in the cache: names of tenants must not meet."""
        return name if self.sees_all else self._prefix + name

    def own_pin(self, name: str) -> str | None:
        """What a tenant calls a pin of the cache; None for one that is not its own."""
        if self.sees_all:
            return name
        return name.removeprefix(self._prefix) if name.startswith(self._prefix) else None

    @property
    def _prefix(self) -> str:
        return f"{self.tenant.tenant_id}/"


def scope_of(tenant: Tenant, settings: ServerSettings) -> Scope:
    """What a tenant may mean: everything only when no other tenant has the same rights."""
    has_admin_key = settings.admin_key is not None
    return Scope(tenant, sees_all=tenant.is_admin and (has_admin_key or tenant.salt is None))


def _of_admin(tenant: Admin, service: Serving) -> Scope:
    return scope_of(tenant, service.settings)


def _of_asker(tenant: Asker, service: Serving) -> Scope:
    return scope_of(tenant, service.settings)


AdminScope = Annotated[Scope, Depends(_of_admin)]
AskerScope = Annotated[Scope, Depends(_of_asker)]
