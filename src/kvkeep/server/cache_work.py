"""What routes of the cache ask of the model, on the thread that owns it, as JSON."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from kvkeep.cache import BlockReport, PinReport, PurgeReceipt, Selector, SessionReport
from kvkeep.cache.explain import Miss, Sent
from kvkeep.cache.slices import Bits
from kvkeep.llm import LLM
from kvkeep.metrics import reuse_class
from kvkeep.planning import DEVICE, Coverage
from kvkeep.server.cache_inspection import Question, inspection_of, query_of
from kvkeep.server.cache_prompts import GivenPrompt
from kvkeep.server.tenants import Tokens

__all__ = [
    "Known",
    "block_fields",
    "cache_fields",
    "known_of",
    "own_fields",
    "pin_fields",
    "purge_fields",
    "session_fields",
    "shown_time",
]


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a prompt that was not sent, and why not more."""

    coverage: Coverage
    block_size: int
    miss: Miss | None

    def fields(self) -> dict[str, Any]:
        """Tokens by where they are, and the runs."""
        tokens: Counter[str] = Counter()
        for run in self.coverage.runs:
            if run.source is not None:
                tokens[run.source] += run.stop - run.start
        total, known = self.coverage.num_tokens, self.coverage.known_tokens
        return {
            "object": "cache.lookup",
            "status": reuse_class(total, known, self.block_size),
            "total_tokens": total,
            "known_tokens": known,
            "missing_tokens": total - known,
            "block_size": self.block_size,
            "total_blocks": total // self.block_size,
            "tiers": {DEVICE: tokens.pop(DEVICE, 0), **tokens},
            "runs": [asdict(run) for run in self.coverage.runs],
        }


def known_of(
    prompt: GivenPrompt, *, salt: str | None, owner: str | None, session: str | None
) -> Callable[[LLM], Known]:
    """The question what is known of a prompt; changes nothing."""

    def ask(llm: LLM) -> Known:
        chain = llm.engine.chain(prompt.ids, salt)
        coverage = llm.engine.cache.coverage(chain)
        sent = Sent(
            namespace=llm.engine.namespace(salt),
            chain=chain,
            outline=prompt.outline,
            session=session,
            owner=owner,
        )
        miss = llm.engine.history.explain(sent, coverage.gaps)
        return Known(coverage, chain.block_size, miss)

    return ask


def cache_fields(llm: LLM) -> Bits[dict[str, Any]]:
    """The question for the state of the cache: device, tiers, what was reused, pins, whose content it is."""
    pins = yield from inspection_of(llm).pins()
    stats = llm.cache.stats()
    tiers: dict[str, dict[str, Any]] = {
        DEVICE: {
            "capacity_bytes": stats.capacity_bytes,
            "used_bytes": stats.in_use_bytes + stats.reusable_bytes,
            "in_use_bytes": stats.in_use_bytes,
            "reusable_bytes": stats.reusable_bytes,
            "free_bytes": stats.free_bytes,
            "entries": sum(group.in_use + group.reusable for group in stats.groups),
            "evictions": sum(group.num_evictions for group in stats.groups),
        }
    }
    for report in stats.tiers:
        tier = report.tier
        tiers[tier.name] = {
            "capacity_bytes": tier.capacity_bytes,
            "used_bytes": tier.in_use_bytes + tier.reusable_bytes,
            "in_use_bytes": tier.in_use_bytes,
            "reusable_bytes": tier.reusable_bytes,
            "free_bytes": tier.free_bytes,
            "entries": tier.num_objects,
            "evictions": tier.num_evictions,
            "loaded_blocks": report.num_loaded,
            "loaded_bytes": report.loaded_bytes,
            "load_failures": report.load_failures,
        }
    tokens = Tokens(stats.reused_tokens, stats.computed_tokens)
    return {**_state(llm, tiers, tokens, pins), "running": stats.open_leases}


def own_fields(
    salts: tuple[str | None, ...], tokens: Tokens, own_pin: Callable[[PinReport], str | None]
) -> Question[dict[str, Any]]:
    """The question for the state of what one tenant has: its blocks of these salts, by tier, and its pins."""

    def ask(llm: LLM) -> Bits[dict[str, Any]]:
        inspection, query = inspection_of(llm), query_of(llm, Selector(salts=salts))
        entries, num_bytes = Counter[str](), Counter[str]()
        for keys in inspection.walk(query):
            for held in inspection.held(keys):
                entries.update(held.place_to_bytes.keys())
                num_bytes.update(held.place_to_bytes)
            yield
        names = [DEVICE, *(report.tier.name for report in llm.cache.stats().tiers)]
        tiers = {name: {"used_bytes": num_bytes[name], "entries": entries[name]} for name in names}
        every = yield from inspection_of(llm).pins()
        pins = [one for one in every if own_pin(one) is not None]
        return _state(llm, tiers, tokens, pins)

    return ask


def _state(
    llm: LLM, tiers: Mapping[str, Any], tokens: Tokens, pins: Sequence[PinReport]
) -> dict[str, Any]:
    asked = tokens.reused + tokens.computed
    return {
        "object": "cache",
        "tiers": tiers,
        "reused_tokens": tokens.reused,
        "computed_tokens": tokens.computed,
        "hit_rate": tokens.reused / asked if asked else None,
        "pins": len(pins),
        "pinned_blocks": sum(pin.num_on_device for pin in pins),
        "block_size": llm.settings.block_size,
        "policy": llm.settings.policy,
        "kv_format": llm.settings.kv_format,
        "fingerprint": llm.installed.namespace.model,
    }


def purge_fields(receipt: PurgeReceipt) -> dict[str, Any]:
    """What a purge did, or would do."""
    return {
        "object": "cache.purge",
        "matched": receipt.matched,
        "deleted": receipt.deleted,
        "freed_bytes": receipt.freed_bytes,
        "skipped_pinned": receipt.skipped_pinned,
        "skipped_in_use": receipt.in_use,
        "tiers": receipt.stored,
        "not_reached": list(receipt.not_reached),
        "dry_run": receipt.dry_run,
    }


def session_fields(report: SessionReport) -> dict[str, Any]:
    """A session."""
    return {
        "object": "cache.session",
        "id": report.name,
        "blocks": report.num_blocks,
        "own_blocks": report.num_own_blocks,
        "tokens": report.num_tokens,
        "requests": report.num_requests,
        "running": report.num_running,
        "context": report.context,
        "created_at": shown_time(report.created_at),
        "used_at": shown_time(report.used_at),
        "ends_at": shown_time(report.ends_at),
    }


def pin_fields(name: str, report: PinReport) -> dict[str, Any]:
    """A pin, by the name that its owner knows."""
    return {
        "object": "cache.pin",
        "name": name,
        "blocks": report.num_blocks,
        "blocks_on_device": report.num_on_device,
        "tiers": report.stored,
    }


def block_fields(report: BlockReport) -> dict[str, Any]:
    """A block, what it bears and where it lies."""
    return {
        "object": "cache.entry",
        "id": report.key.hex(),
        "tiers": list(report.places),
        "bytes": report.num_bytes,
        "sessions": list(report.sessions),
        "shared": report.is_shared,
        "tags": list(report.tags),
        "pins": list(report.pins),
        "priority": report.priority,
        "created_at": shown_time(report.created_at),
        "used_at": shown_time(report.used_at),
        "expires_at": shown_time(report.expires_at),
    }


def shown_time(seconds: float | None) -> str | None:
    """A time in seconds since 1970 as text, None for never, or for what is beyond calendars."""
    if seconds is None:
        return None
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return None
