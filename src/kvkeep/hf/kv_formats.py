"""The formats that a model's K/V get: those asked for, but for layers that must stay exact."""

from kvkeep.config import EngineSettings
from kvkeep.hf.format_probe import FormatProbe, is_quantised, measure_basis, probe_format
from kvkeep.hf.geometry import text_config
from kvkeep.hf.trial_logits import Served
from kvkeep.spec import KVSpec, with_format

__all__ = ["asked_formats", "measure_format", "needs_measuring"]


def asked_formats(spec: KVSpec, settings: EngineSettings) -> KVSpec:
    """`spec` as the settings say, only those layers exact that they name. Raises as `with_format` does."""
    layers = () if isinstance(settings.kv_exact_layers, str) else settings.kv_exact_layers
    return with_format(spec, settings.kv_format, exact_layers=layers)


def needs_measuring(spec: KVSpec, settings: EngineSettings) -> bool:
    """Whether measuring must say which layers of `spec`, which has its formats, stay exact."""
    return settings.kv_exact_layers == "auto" and is_quantised(spec)


def measure_format(served: Served, name: str) -> FormatProbe:
    """What a quantised format does to the model as it is served, and which layers must stay exact.

    Warns of them. Raises UnsupportedModelError where the format changes by too much what the model says.
    """
    probe = probe_format(served, name, measure_basis(served))
    geometry = served.geometry
    probe.check(text_config(served.model).model_type, len(geometry.places), geometry.spec.dtype)
    return probe
