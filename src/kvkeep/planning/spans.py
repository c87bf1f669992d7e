"""Which positions of a request one step computes: spans from the front of its gaps."""

from collections.abc import Sequence

from kvkeep.spec import KVSpec, Span

__all__ = ["cut_spans"]


def cut_spans(spec: KVSpec, gaps: Sequence[Span], num_tokens: int, budget: int) -> tuple[Span, ...]:
    """At most `budget` tokens from the front of the gaps of a request of `num_tokens` tokens.

    Several gaps fit into one step, because each layer writes all K/V before any query reads. A recurrent
    state is known only where a step ends, so there a step takes one span and ends on a block's boundary
    if it can, the last one before the final token included: that is where the state is kept for others.
    """
    spans: list[Span] = []
    for gap in gaps:
        stop = min(gap.stop, gap.start + budget)
        if stop == gap.start:
            break
        if spec.is_recurrent:
            return (Span(gap.start, _state_boundary(spec, gap.start, stop, num_tokens)),)
        spans.append(Span(gap.start, stop))
        budget -= stop - gap.start
    return tuple(spans)


def _state_boundary(spec: KVSpec, start: int, stop: int, num_tokens: int) -> int:
    last = min(stop, num_tokens - 1)
    boundary = last - last % spec.block_size
    return boundary if boundary > start else stop
