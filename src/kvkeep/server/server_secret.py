"""The secret of a server: kept in a file, so that tenants find their blocks again after a restart."""

import os
from pathlib import Path
from secrets import token_bytes
from tempfile import NamedTemporaryFile

from kvkeep.errors import ConfigError

__all__ = ["read_secret"]

_NUM_BYTES = 32


def read_secret(path: Path | None) -> bytes:
    """The secret in a file, which is made, for its owner alone, when it is not there; a new one without.

    Several processes that start at once get the same. Raises ConfigError when the file cannot be used.
    """
    if path is None:
        return token_bytes(_NUM_BYTES)
    try:
        if not path.exists():
            _make(path)
        secret = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"secret_file={str(path)!r} cannot be used ({error.strerror}); give a path in a folder of yours"
        ) from error
    if len(secret) < _NUM_BYTES:
        raise ConfigError(
            f"secret_file={str(path)!r} has {len(secret)} bytes, fewer than {_NUM_BYTES}; remove it, and a "
            "new one is made"
        )
    return secret


def _make(path: Path) -> None:
    """Whole or not at all, and never over one that somebody else has just made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        file.write(token_bytes(_NUM_BYTES))  # readable by its owner only, as all temporary files
        file.flush()
        os.fsync(file.fileno())
    made = Path(file.name)
    try:
        os.link(made, path)
    except FileExistsError:
        pass
    finally:
        made.unlink()
