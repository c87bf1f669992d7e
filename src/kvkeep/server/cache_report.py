"""What a response says of the cache: usage counts, headers, and the object `kv_cache` for those who ask."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from kvkeep.cache import Receipt
from kvkeep.cache.explain.miss import Miss
from kvkeep.config import CacheOptions
from kvkeep.metrics import reuse_class
from kvkeep.server.token_texts import TokenTexts

__all__ = [
    "cache_headers",
    "cache_report",
    "miss_fields",
    "num_written",
    "usage_fields",
    "written_tokens",
]


def written_tokens(receipt: Receipt, options: CacheOptions, block_size: int) -> int:
    """Prompt tokens that were not in the cache and that this request left there: those of full blocks.

    Never more than what was computed.
    """
    return num_written(receipt.prompt_tokens, receipt.reused_tokens, options, block_size)


def num_written(
    prompt_tokens: int, reused_tokens: int, options: CacheOptions, block_size: int
) -> int:
    """The same of a prompt that is still being answered, of which so many tokens were reused."""
    # The last token of a prompt is computed even where its block was there.
    if not options.write or prompt_tokens - reused_tokens <= 1:
        return 0
    return max(0, prompt_tokens // block_size * block_size - reused_tokens)


def usage_fields(receipts: Sequence[Receipt], num_written: int) -> dict[str, Any]:
    """The usage of the OpenAI protocol, for one prompt or several; 0 is said as 0, never left out."""
    prompt = sum(receipt.prompt_tokens for receipt in receipts)
    output = sum(receipt.output_tokens for receipt in receipts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {
            "cached_tokens": sum(receipt.reused_tokens for receipt in receipts),
            "cache_write_tokens": num_written,
        },
    }


def cache_headers(receipts: Sequence[Receipt], block_size: int) -> dict[str, str]:
    """`x-kv-cache` and `Server-Timing` of a response that is sent when all is done."""
    reused = sum(receipt.reused_tokens for receipt in receipts)
    prompt = sum(receipt.prompt_tokens for receipt in receipts)
    status = _status(receipts, block_size).upper()
    headers = {"x-kv-cache": f"{status}; tokens={reused}/{prompt}"}
    timings = list(map(_timings, receipts))
    longest = {name: max(timing[name] or 0.0 for timing in timings) for name in timings[0]}
    parts = [f"{name};dur={seconds * 1e3:.1f}" for name, seconds in longest.items() if seconds]
    return headers | {"Server-Timing": ", ".join(parts)}


def cache_report(
    receipt: Receipt,
    options: CacheOptions,
    block_size: int,
    *,
    texts: TokenTexts | None = None,
) -> dict[str, Any]:
    """The object `kv_cache` of a response to a request with `explain`.

    With `texts` a miss has its snippets as text: of what the same tenant sent before, and sends now.
    """
    return {
        "session": options.session,
        "status": _status([receipt], block_size),
        "tiers": {name: n for name, n in receipt.tokens_by_source.items() if name != "computed"},
        "computed_tokens": receipt.computed_tokens,
        "recomputed_tokens": receipt.recomputed_tokens,
        "load_failures": receipt.load_failures,
        "ttft_ms": _milliseconds(receipt.first_token_s),
        "queue_ms": _milliseconds(receipt.queue_s),
        "restore_ms": _milliseconds(receipt.restore_s),
        "saved_ms_est": _milliseconds(receipt.saved_s),
        "expires_at": _expires_at(receipt),
        "miss": miss_fields(receipt.miss, texts),
    }


def _status(receipts: Sequence[Receipt], block_size: int) -> str:
    """What is true of all prompts; partial where they differ."""
    classes = {
        reuse_class(receipt.prompt_tokens, receipt.reused_tokens, block_size)
        for receipt in receipts
    }
    return classes.pop() if len(classes) == 1 else "partial"


def _timings(receipt: Receipt) -> dict[str, float | None]:
    """What a request waited for, in seconds, as far as it is known; the same names for all of them."""
    first_s, queue_s = receipt.first_token_s, receipt.queue_s
    return {
        "queue": queue_s,
        "restore": receipt.restore_s,
        "prefill": None if first_s is None or queue_s is None else first_s - queue_s,
        "first_token": first_s,
        "total": receipt.total_s,
    }


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 1)


def _expires_at(receipt: Receipt) -> str | None:
    if receipt.expires_at is None:
        return None
    try:
        return datetime.fromtimestamp(receipt.expires_at, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError):
        return None  # farther than calendars go


def miss_fields(miss: Miss | None, texts: TokenTexts | None) -> dict[str, Any] | None:
    """A miss as JSON, its snippets as text: for the tenant whose prompts are compared, and nobody else."""
    if miss is None:
        return None
    fields: dict[str, Any] = {
        "type": miss.type.value,
        "first_divergent_token": miss.first_divergent_token,
        "message_index": miss.message_index,
        "missed_tokens": miss.missed_tokens,
    }
    if texts is not None and miss.first_divergent_token is not None:
        for name, ids in (("cached_text", miss.cached_ids), ("sent_text", miss.sent_ids)):
            fields[name] = b"".join(map(texts.raw, ids)).decode("utf-8", "replace")
    return fields
