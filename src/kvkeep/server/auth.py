"""Who asks: keys are compared in constant time, and every key is a tenant with a salt of its own."""

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, NewType

from fastapi import Depends, Request

from kvkeep.config.server import ServerSettings
from kvkeep.server.errors import ApiError

__all__ = ["Admin", "Asker", "Gate", "Tenant", "TenantId"]

# Names a tenant in logs and to the administrator; says nothing about the key.
TenantId = NewType("TenantId", str)

_SALT_CHARACTERS = 32
_NO_KEY = TenantId("local")


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who asks. `salt` isolates its blocks from those of others; None where no keys are set, or all share.

    `is_admin`: may use routes that show or remove what is not its own.
    """

    tenant_id: TenantId
    salt: str | None
    is_admin: bool

    def salt_for(self, asked: str | None) -> str | None:
        """The salt to serve a request with that asks for salt `asked`: never one of another tenant.

        Equal askers get equal salts. What a client calls its salt is mixed in, not taken as it is, where
        tenants are isolated.
        """
        if self.salt is None:
            return asked
        if asked is None:
            return self.salt
        return _derive(self.salt.encode(), b"client", asked)


class Gate:
    """The keys of a server. `secret` is what salts are derived with: the same one gives the same salts."""

    def __init__(self, settings: ServerSettings, secret: bytes) -> None:
        self._is_open = not settings.api_keys
        self._digest_to_tenant: dict[bytes, Tenant] = {}
        keys = [(key, settings.admin_key is None) for key in settings.api_keys]
        if settings.admin_key is not None:
            keys.append((settings.admin_key, True))
        for key, is_admin in keys:
            salt = _derive(secret, b"tenant", key)
            tenant_id = TenantId(_derive(secret, b"name", key)[:8])
            self._digest_to_tenant[_digest(key)] = Tenant(
                tenant_id, salt if settings.isolate_keys else None, is_admin
            )
        self._local = Tenant(_NO_KEY, None, is_admin=settings.admin_key is None)
        named = [self._digest_to_tenant[_digest(key)] for key in settings.api_keys]
        self._salt_to_owner = {one.salt: one for one in named or [self._local]}

    @property
    def tenants(self) -> list[Tenant]:
        """The tenants of all keys."""
        return list(self._digest_to_tenant.values())

    @property
    def owners(self) -> list[Tenant]:
        """One tenant for each cache that requests use: one in all where keys share, or are not set."""
        return list(self._salt_to_owner.values())

    def admit(self, headers: Mapping[str, str]) -> Tenant:
        """The tenant whose key is in `Authorization: Bearer KEY` or `x-api-key`.

        Names of `headers` are in lower case. Raises ApiError 401 for a key that is wrong, or missing where
        keys are set.
        """
        key = _key_of(headers)
        tenant = None if key is None else self._find(key)
        if tenant is not None:
            return tenant
        if self._is_open:
            # A client that always sends some key is welcome where none is set.
            return self._local
        what = "is wrong" if key else "is missing"
        raise ApiError(
            401,
            f"the API key {what}; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
            kind="authentication_error",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )

    def _find(self, key: str) -> Tenant | None:
        """Compare with every key, so that time tells nothing about which one was nearly right."""
        digest = _digest(key)
        found = None
        for known, tenant in self._digest_to_tenant.items():
            if hmac.compare_digest(known, digest):
                found = tenant
        return found


async def asker_of(request: Request) -> Tenant:
    """The tenant that the gate let in."""
    tenant = request.state.tenant
    assert isinstance(tenant, Tenant)
    return tenant


async def admin_of(request: Request) -> Tenant:
    """The tenant, if it may administer. Raises ApiError 403 otherwise."""
    tenant = await asker_of(request)
    if not tenant.is_admin:
        raise ApiError(
            403,
            "this route needs the admin key; send it instead of the API key",
            kind="permission_error",
            code="admin_key_required",
        )
    return tenant


# Parameters of routes: every route is behind the gate, which Asker only reads from; Admin asks for more.
Asker = Annotated[Tenant, Depends(asker_of)]
Admin = Annotated[Tenant, Depends(admin_of)]


def _key_of(headers: Mapping[str, str]) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key") or None


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()


def _derive(secret: bytes, purpose: bytes, text: str) -> str:
    message = purpose + b"\0" + text.encode("utf-8", "surrogatepass")
    return hmac.new(secret, message, sha256).hexdigest()[:_SALT_CHARACTERS]
