"""Answers that are given as a whole."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from starlette.responses import Response

from kvkeep.cache import Receipt
from kvkeep.server.cache_report import cache_headers

__all__ = ["json_answer"]


def json_answer(
    fields: Mapping[str, Any],
    receipts: Sequence[Receipt],
    block_size: int,
    headers: Mapping[str, str],
) -> Response:
    """An answer of these fields and headers, with those that say what the cache did for its prompts."""
    return Response(
        msgspec.json.encode(fields),
        media_type="application/json",
        headers={**cache_headers(receipts, block_size), **headers},
    )
