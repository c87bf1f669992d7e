"""Where kvkeep enters a model's forward: one attention function and one mask function, by name.

They are registered with transformers under one name, which a model's configs carry only while a step runs:
outside of it the model is untouched and serves ordinary forwards as before.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from kvkeep.attention import AttentionTerms

__all__ = ["AttentionStep", "decoder_configs", "installed", "is_running", "register", "running"]

_NAME = "kvkeep"


class AttentionStep(Protocol):
    """What the attention function asks of the step that is running."""

    def attend(
        self, layer: int, q_1HTD: Tensor, k_1KTD: Tensor, v_1KTD: Tensor, terms: AttentionTerms
    ) -> Tensor:
        """Attention of all queries of the step in one layer, shape [1, T, H, D]."""


_STEP: ContextVar[AttentionStep | None] = ContextVar("kvkeep_step", default=None)
_IS_RUNNING: ContextVar[bool] = ContextVar("kvkeep_is_running", default=False)


def is_running() -> bool:
    """Whether a step of kvkeep is running in this context."""
    return _IS_RUNNING.get()


@contextmanager
def running() -> Iterator[None]:
    """While the context lasts, a step runs; its model attends in its own way unless it is `installed` too."""
    token = _IS_RUNNING.set(True)
    try:
        yield
    finally:
        _IS_RUNNING.reset(token)


def decoder_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every config object that some module of the model asks for its attention's name."""
    configs = {id(model.config): model.config}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            configs[id(config)] = config
    return list(configs.values())


def register() -> None:
    """Make the two functions known to transformers; until `installed`, no model uses them."""
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, _no_mask)


@contextmanager
def installed(configs: Sequence[PreTrainedConfig], step: AttentionStep) -> Iterator[None]:
    """While the context lasts, models with these configs attend through `step`; call `register` before."""
    names = [config._attn_implementation_internal for config in configs]
    token = _STEP.set(step)
    try:
        for config in configs:
            config._attn_implementation_internal = _NAME
        with running():
            yield
    finally:
        for config, name in zip(configs, names, strict=True):
            config._attn_implementation_internal = name
        _STEP.reset(token)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,  # what transformers passes to every backend; windows come from the config
) -> tuple[Tensor, None]:
    """The function registered with transformers; [B, 1] batches are seen as B packed tokens."""
    step = _STEP.get()
    assert step is not None, "a kvkeep step is not running in this context"
    is_batched = query.shape[0] > 1
    if is_batched:
        query, key, value = (part.transpose(0, 2) for part in (query, key, value))
    terms = AttentionTerms(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        sinks_H=s_aux if s_aux is not None else others.get("sinks"),
    )
    layer = module.layer_idx
    assert isinstance(layer, int)
    out = step.attend(layer, query, key, value, terms)
    return (out.transpose(0, 1) if is_batched else out), None


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """No mask is built: which position reads which is known from the step."""
