"""Training text: the standard library of the interpreter that runs the script."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

SKIPPED_FOLDERS = {
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "ensurepip",
    "encodings",
    "__pycache__",
}
HELD_OUT_SHARE = 0.06


def is_held_out(name: str) -> bool:
    """Whether a module is kept for evaluation, decided by a hash of its name."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < HELD_OUT_SHARE


def module_paths() -> list[Path]:
    """Paths of the library's own modules, sorted, relative to the library root."""
    root = Path(sysconfig.get_path("stdlib"))
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(path for path in found if not SKIPPED_FOLDERS.intersection(path.parts))


def read_modules(*, held_out: bool) -> list[str]:
    """Texts of the training modules, or of the held-out ones."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in module_paths():
        if is_held_out(path.as_posix()) == held_out:
            text = (root / path).read_text(encoding="utf-8", errors="replace")
            texts.append(text.replace("\r\n", "\n"))
    return texts
