"""What computing costs with this model on this machine: a few steps, once, kept for the next start."""

from time import perf_counter

from kvkeep.blocks import TokenChain
from kvkeep.hf.install import InstalledModel
from kvkeep.hf.paged_model import Work
from kvkeep.planning import ComputeCost
from kvkeep.planning.calibration import (
    Calibration,
    load_calibration,
    machine_id,
    measure_compute,
    save_calibration,
)
from kvkeep.spec import Span

__all__ = ["calibrate", "keep_calibration"]

_MOST_TOKENS = 192
_GUESS = ComputeCost(fixed_s=1e-3, linear_s=1e-3, quadratic_s=1e-8)


def calibrate(installed: InstalledModel, folder: str | None) -> Calibration:
    """Costs to start from: those kept in `folder` for this model here, else measured, and kept there.

    With None they are measured every time.
    """
    model, machine = installed.namespace.model, machine_id()
    found = None if folder is None else load_calibration(folder, model, machine)
    if found is not None:
        return found
    measured = Calibration(compute=_measure(installed))
    if folder is not None:
        save_calibration(folder, model, machine, measured)
    return measured


def keep_calibration(installed: InstalledModel, folder: str | None) -> None:
    """Keep what has been learnt for the next start."""
    if folder is not None and installed.chooser is not None:
        learnt = installed.chooser.calibration
        save_calibration(folder, installed.namespace.model, machine_id(), learnt)


def _measure(installed: InstalledModel) -> ComputeCost:
    """Steps over K/V that mean nothing: what they say is thrown away, how long they take is not."""
    cache = installed.cache
    least = min(cache.num_blocks()) * cache.spec.block_size
    num_tokens = max(1, min(_MOST_TOKENS, least, installed.max_context))
    chain = TokenChain(
        installed.namespace.root_key(),
        cache.spec.block_size,
        [1 + at % 7 for at in range(num_tokens)],
    )
    lease = cache.reserve(chain, read=False, write=False)
    if lease is None:
        return _GUESS
    with lease:
        if not cache.extend(lease, [Span(0, num_tokens)]):
            return _GUESS

        def run(span: Span) -> float:
            start = perf_counter()
            installed.paged.forward([Work(lease, (span,), wants_logits=True)])
            return perf_counter() - start

        return measure_compute(run, most_tokens=num_tokens, guess=_GUESS, rounds=1)
