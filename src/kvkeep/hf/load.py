"""Models and tokenizers by name, path, or as they are."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvkeep.errors import ConfigError
from kvkeep.hf.geometry import text_config

__all__ = ["BUNDLED", "LoadedModel", "load_model"]

# The name of the demonstration model that comes with the package.
BUNDLED = "tiny"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on its device, its tokenizer if it has one, and the tokens that end its outputs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    eos_ids: frozenset[int]
    name: str


def load_model(
    model: object,
    tokenizer: object = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> LoadedModel:
    """Load `model`: "tiny" (bundled), a path, a hub id, a loaded model, or a pair (model, tokenizer).

    `dtype` and `device` default to what a loaded model has, else to the checkpoint's and to CUDA where
    present.
    Raises ConfigError when nothing can be loaded; the bundled model never stands in for another.
    """
    if isinstance(model, tuple):
        model, tokenizer = _pair(model)
    torch_dtype = _dtype(dtype)
    _check_device(device)
    if isinstance(model, PreTrainedModel):
        loaded, name = model, type(model).__name__
        if torch_dtype is not None or device is not None:
            loaded = _moved(loaded, device, torch_dtype)
    elif isinstance(model, str | Path):
        name = str(model)
        source = str(files("kvkeep") / "bundled" / BUNDLED) if name == BUNDLED else _source(name)
        loaded = _from_pretrained(name, source, torch_dtype, device)
        tokenizer = tokenizer if tokenizer is not None else _own_tokenizer(source)
    else:
        raise ConfigError(
            f"model={model!r:.80} is neither a name nor a model; give {BUNDLED!r}, a path, a hub id, a "
            "transformers model, or (model, tokenizer)"
        )
    found = _tokenizer(tokenizer)
    return LoadedModel(loaded.eval(), found, _eos_ids(loaded, found), name)


def _source(name: str) -> str:
    """A path as the loader takes it, or a hub id as it is."""
    path = Path(name).expanduser()
    is_path = name.startswith(("~", ".")) or path.is_absolute() or name.count("/") > 1
    if is_path and not path.is_dir():
        raise ConfigError(
            f"model={name!r} is no folder; give the path of a transformers checkpoint, a hub id, or "
            f"{BUNDLED!r} for the bundled one"
        )
    return str(path) if path.is_dir() else name


def _pair(pair: tuple[object, ...]) -> tuple[object, object]:
    if len(pair) != 2:
        raise ConfigError(f"model is a tuple of {len(pair)}; give (model, tokenizer)")
    return pair[0], pair[1]


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f'dtype={dtype!r} is unknown; give "float32", "bfloat16" or "float16"')
    return found


def _check_device(device: str | torch.device | None) -> None:
    """Raise ConfigError for a device that there is not, before anything is loaded for it."""
    if device is None:
        return
    known = ['"cpu"', *(f'"cuda:{number}"' for number in range(torch.cuda.device_count()))]
    remedy = f"give {' or '.join(known)}"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device={device!r:.80} is no device; {remedy}") from error
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device={str(device)!r} cannot be used here ({_first_line(error)}); {remedy}"
        ) from error


def _from_pretrained(
    name: str, source: str, dtype: torch.dtype | None, device: str | torch.device | None
) -> PreTrainedModel:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto")
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"model={name!r} cannot be loaded ({_first_line(error)}); give the path of a transformers "
            f"checkpoint, a hub id that is reachable, or {BUNDLED!r} for the bundled one"
        ) from error
    assert isinstance(model, PreTrainedModel)
    return _moved(model, device, None)


def _moved(
    model: PreTrainedModel, device: str | torch.device | None, dtype: torch.dtype | None
) -> PreTrainedModel:
    nn.Module.to(model, device=device, dtype=dtype)  # moves in place
    return model


def _own_tokenizer(source: str) -> object:
    """The checkpoint's tokenizer, or None when it has none: token ids can be served all the same."""
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError):
        return None


def _tokenizer(tokenizer: object) -> PreTrainedTokenizerBase | None:
    if tokenizer is None or isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    if isinstance(tokenizer, str | Path):
        try:
            found: Any = AutoTokenizer.from_pretrained(str(tokenizer))
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"tokenizer={str(tokenizer)!r} cannot be loaded ({_first_line(error)}); give a path or a "
                "transformers tokenizer"
            ) from error
        assert isinstance(found, PreTrainedTokenizerBase)
        return found
    raise ConfigError(
        f"tokenizer={tokenizer!r:.80} is no tokenizer; give a path or a transformers tokenizer"
    )


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    configs = (model.generation_config, text_config(model), tokenizer)
    for config in configs:
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
