"""Orders to a running training process, read from a small text file.

Known lines: ``threads=N``, ``tokens=N`` (a new budget) and ``pause``.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

PAUSE_SECONDS = 5


class Control:
    """Applies the orders in a file; without a file there are none."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def _orders(self) -> dict[str, str]:
        if self.path is None or not self.path.exists():
            return {}
        lines = self.path.read_text(encoding="utf-8").split()
        return {name: value for name, _, value in (line.partition("=") for line in lines)}

    def apply(self, budget: int) -> int:
        """Wait while paused, set the threads, return the budget now in force."""
        orders = self._orders()
        while "pause" in orders:
            time.sleep(PAUSE_SECONDS)
            orders = self._orders()
        threads = int(orders.get("threads", torch.get_num_threads()))
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
        return int(orders.get("tokens", budget))
