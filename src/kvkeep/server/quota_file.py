"""Quotas in a file, so that they outlive the server."""

from dataclasses import dataclass
from pathlib import Path

from kvkeep.server.kept_lines import VERSION, KeptLine, KeptLines

__all__ = ["KeptQuota", "QuotaFile"]


@dataclass(frozen=True, slots=True)
class KeptQuota:
    """So many bytes for the blocks of a salt, in a tier or altogether."""

    salt: str
    tier: str | None
    limit_bytes: int


class _Line(KeptLine, frozen=True, omit_defaults=True, kw_only=True):
    salt: str
    tier: str | None = None
    limit_bytes: int = 0


class QuotaFile:
    """The file at `path`, for one thread at a time; it holds for whatever model is served."""

    def __init__(self, path: Path) -> None:
        self._lines = KeptLines(path, _Line, lambda line: (line.salt, line.tier), "quotas")

    def load(self) -> list[KeptQuota]:
        """The quotas that are in the file."""
        return [KeptQuota(line.salt, line.tier, line.limit_bytes) for line in self._lines.load()]

    def put(self, quota: KeptQuota) -> None:
        """Write down a quota as it is now."""
        limit_bytes = quota.limit_bytes
        self._lines.append(
            _Line(v=VERSION, salt=quota.salt, tier=quota.tier, limit_bytes=limit_bytes)
        )

    def remove(self, salt: str, tier: str | None) -> None:
        """Write down that a quota is no more."""
        self._lines.append(_Line(v=VERSION, salt=salt, tier=tier, gone=True))

    def tidy(self) -> None:
        """Leave nothing in the file that does not hold."""
        self._lines.tidy()
