"""Lines of the log: one for every job, as text or JSON. What was asked and answered is never in them."""

import json
import logging
from collections.abc import Mapping
from time import gmtime, strftime

from kvkeep.server.jobs import Finished

__all__ = ["JsonLines", "TextLines", "log_job"]

_log = logging.getLogger("kvkeep.server.jobs")
# Where a record has what its line says in fields.
_FIELDS = "fields"


def log_job(finished: Finished) -> None:
    """An observer of a Service: one line about a job that has ended."""
    fields = _job_fields(finished)
    _log.info(_job_line(fields), extra={_FIELDS: fields})


class TextLines(logging.Formatter):
    """Time, and what there is to say."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname).1s %(message)s")


class JsonLines(logging.Formatter):
    """One JSON object in a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": strftime("%Y-%m-%dT%H:%M:%S", gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields = getattr(record, _FIELDS, None)
        line |= fields if fields is not None else {"message": record.getMessage()}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _job_fields(finished: Finished) -> dict[str, object]:
    job, receipt = finished.job, finished.receipt
    ended = {} if receipt is None else {
        "cached_tokens": receipt.reused_tokens,
        "output_tokens": receipt.output_tokens,
    }  # fmt: skip
    unfinished = "timeout" if finished.is_late else "left"
    first = {} if finished.waited_s is None else {"first_token_ms": _ms(finished.waited_s)}
    return {
        "request_id": job.request_id,
        "route": job.route,
        "tenant": job.tenant.tenant_id,
        "prompt_tokens": len(job.prompt_ids),
        **ended,
        "finish": ",".join(dict.fromkeys(finished.finish_reasons)) or unfinished,
        **first,
        "total_ms": _ms(finished.total_s),
    }


def _job_line(fields: Mapping[str, object]) -> str:
    """The same for people.

    >>> _job_line({"request_id": "r1", "prompt_tokens": 40, "cached_tokens": 32, "output_tokens": 8,
    ...     "finish": "length", "total_ms": 12.5, "route": "/v1/completions"})
    'r1 · 40 in, 32 cached · 8 out · length · 12.5 ms · /v1/completions'
    """
    cached = f", {fields['cached_tokens']} cached" if "cached_tokens" in fields else ""
    parts = [str(fields["request_id"]), f"{fields['prompt_tokens']} in{cached}"]
    if "output_tokens" in fields:
        parts.append(f"{fields['output_tokens']} out")
    parts += [str(fields["finish"]), f"{fields['total_ms']} ms", str(fields["route"])]
    return " · ".join(part for part in parts if part)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)
