"""What makes K/V comparable: the model's identity and its position regime, as text for a namespace."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from kvkeep.errors import ConfigError
from kvkeep.hf.geometry import text_config

__all__ = ["longest_context", "model_fingerprint", "position_regime"]

# RoPE types whose frequencies depend on the longest position in the batch, so that a short request
# would be computed differently beside a long one.
_BATCH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


def model_fingerprint(model: PreTrainedModel) -> str:
    """sha256 over the config and every weight (adapters that are merged or attached included)."""
    digest = hashlib.sha256()
    settings = text_config(model).to_dict()
    settings.pop("_name_or_path", None)  # where it was loaded from is not what it is
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    named = sorted(model.state_dict().items())
    with ThreadPoolExecutor() as pool:  # hashing large buffers releases the GIL
        hashes = pool.map(lambda item: _tensor_digest(item[1]), named)
        for (name, tensor), tensor_digest in zip(named, hashes, strict=True):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + tensor_digest)
    return digest.hexdigest()


def position_regime(model: PreTrainedModel) -> str:
    """The RoPE parameters as canonical text; empty for models without."""
    parameters = getattr(text_config(model), "rope_parameters", None)
    return json.dumps(parameters, sort_keys=True, default=str) if parameters else ""


def longest_context(model: PreTrainedModel, asked: int | None) -> int:
    """Tokens a request may have: what is asked for, within what the model was made for.

    Where RoPE depends on the longest position in the batch, the limit is the original context, so that every
    request is in one regime. Raises ConfigError when more is asked for.
    """
    config = text_config(model)
    limit = int(
        getattr(config, "max_position_embeddings", 0) or getattr(config, "seq_length", 0) or 2**31
    )
    why = "the model's max_position_embeddings"
    for parameters in _rope_parameters(config):
        if parameters.get("rope_type") in _BATCH_DEPENDENT_ROPE:
            original = parameters.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            if original:
                limit = min(limit, int(original))
                why = f"the original context of rope_type={parameters['rope_type']!r}"
    if asked is not None and asked > limit:
        raise ConfigError(f"max_context={asked} is more than {limit}, {why}; give at most {limit}")
    return asked or limit


def _rope_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or ([parameters] if parameters else [])


def _tensor_digest(tensor: Tensor) -> bytes:
    if tensor.is_meta:
        return b"meta"
    flat = tensor.detach().to("cpu").contiguous().view(-1)
    content: Any = flat.view(torch.uint8).numpy()  # any: a buffer, which numpy does not declare
    return hashlib.sha256(content).digest()
