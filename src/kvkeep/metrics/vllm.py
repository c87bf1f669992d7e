"""The names of vLLM for what we count, so that boards and routers made for it can read us.

Names and meanings: docs of vLLM, "Production metrics". Made from our own families when they are asked for:
nothing is counted twice.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.core import Metric, Sample

from kvkeep.metrics.base import COMPUTED, DEVICE

__all__ = ["vllm_families"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Name:
    """One of vLLM's families: ours with some labels renamed and samples over the other labels added up.

    `only` and `without` choose samples by one of our labels.
    """

    name: str
    ours: str
    labels: Mapping[str, str] = field(default_factory=dict)
    label: str = ""
    only: Collection[str] = ()
    without: Collection[str] = ()
    constants: Mapping[str, str] = field(default_factory=dict)

    def takes(self, sample: Sample) -> bool:
        """Whether a sample of ours counts."""
        value = sample.labels.get(self.label, "")
        return (not self.only or value in self.only) and value not in self.without


def _tokens(
    name: str, source: str = "", *, only: Collection[str] = (), without: Collection[str] = ()
) -> _Name:
    """Prompt tokens, of some of our sources."""
    return _Name(
        name=name,
        ours="kvkeep_prompt_tokens",
        label="source",
        only=only,
        without=without,
        constants={"source": source} if source else {},
    )


_NAMES = (
    _Name(name="num_requests_running", ours="kvkeep_requests_running"),
    _Name(name="num_requests_waiting", ours="kvkeep_requests_waiting"),
    _Name(name="kv_cache_usage_perc", ours="kvkeep_device_usage_ratio"),
    _tokens("prefix_cache_queries"),
    _tokens("prefix_cache_hits", only=[DEVICE]),
    _tokens("external_prefix_cache_queries", without=[DEVICE]),
    _tokens("external_prefix_cache_hits", without=[DEVICE, COMPUTED]),
    _tokens("prompt_tokens"),
    _tokens("prompt_tokens_cached", without=[COMPUTED]),
    _tokens("prompt_tokens_by_source", "local_compute", only=[COMPUTED]),
    _tokens("prompt_tokens_by_source", "local_cache_hit", only=[DEVICE]),
    _tokens("prompt_tokens_by_source", "external_kv_transfer", without=[DEVICE, COMPUTED]),
    _Name(name="prompt_tokens_recomputed", ours="kvkeep_recomputed_tokens"),
    _Name(name="generation_tokens", ours="kvkeep_output_tokens"),
    _Name(name="num_preemptions", ours="kvkeep_preemptions"),
    _Name(
        name="request_success",
        ours="kvkeep_requests",
        labels={"finish_reason": "finished_reason"},
    ),
    _Name(name="time_to_first_token_seconds", ours="kvkeep_time_to_first_token_seconds"),
    _Name(name="inter_token_latency_seconds", ours="kvkeep_inter_token_seconds"),
    _Name(
        name="request_time_per_output_token_seconds",
        ours="kvkeep_time_per_output_token_seconds",
    ),
    _Name(name="e2e_request_latency_seconds", ours="kvkeep_request_seconds"),
    _Name(name="request_queue_time_seconds", ours="kvkeep_queue_seconds"),
    _Name(name="request_prefill_time_seconds", ours="kvkeep_prefill_seconds"),
    _Name(name="request_decode_time_seconds", ours="kvkeep_decode_seconds"),
    _Name(name="request_prompt_tokens", ours="kvkeep_request_prompt_tokens"),
    _Name(name="request_generation_tokens", ours="kvkeep_request_output_tokens"),
    _Name(name="request_prefill_kv_computed_tokens", ours="kvkeep_request_computed_tokens"),
    _Name(
        name="cache_config",
        ours="kvkeep_cache",
        labels={"block_size": "block_size", "num_blocks": "num_gpu_blocks"},
    ),
)


def vllm_families(ours: Iterable[Metric], model: str) -> list[Metric]:
    """Our families under vLLM's names, labelled as by its first engine."""
    name_to_ours = {family.name: family for family in ours}
    theirs: dict[str, Metric] = {}
    for name in _NAMES:
        family = name_to_ours.get(name.ours)
        if family is None:
            continue
        full = f"vllm:{name.name}"
        made = theirs.setdefault(full, Metric(full, family.documentation, family.type))
        made.samples += _translate(name, family, model)
    return list(theirs.values())


def _translate(name: _Name, family: Metric, model: str) -> Sequence[Sample]:
    """The samples under their new names, added up where they differ in labels that are dropped."""
    constants = {"model_name": model, "engine": "0", **name.constants}
    labels = {**name.labels, "le": "le"}
    totals: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for sample in family.samples:
        if not name.takes(sample):
            continue
        suffix = sample.name[len(family.name) :]
        kept = tuple((labels[own], value) for own, value in sample.labels.items() if own in labels)
        totals[suffix, kept] = totals.get((suffix, kept), 0.0) + sample.value
    return [
        Sample(f"vllm:{name.name}{suffix}", {**constants, **dict(kept)}, total)
        for (suffix, kept), total in totals.items()
    ]
