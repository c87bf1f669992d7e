"""How a KeepCache sees the tokens of every forward: two hooks on the model while it lives."""

from abc import ABC, abstractmethod
from typing import Any
from weakref import ReferenceType

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

__all__ = ["ForwardListener", "add_listener", "remove_listener"]

_ATTRIBUTE = "_kvkeep_forward_hooks"


class ForwardListener(ABC):
    """A cache that wants to know when a forward over it begins and ends."""

    @abstractmethod
    def before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The arguments, by name, that the model shall get."""

    @abstractmethod
    def after_forward(self, *, succeeded: bool) -> None:
        """The forward has ended; all was written if it succeeded."""


class _ForwardHooks:
    """The hooks of one model, kept on the model itself, and how many caches need them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.num_listeners = 0
        self.handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(_before, with_kwargs=True),
            model.register_forward_hook(_after, with_kwargs=True, always_call=True),
        ]


def add_listener(model: PreTrainedModel) -> None:
    """Make the model's forwards call the ForwardListener that they get as `past_key_values`."""
    hooks = model.__dict__.get(_ATTRIBUTE)
    if hooks is None:
        hooks = model.__dict__[_ATTRIBUTE] = _ForwardHooks(model)
    hooks.num_listeners += 1


def remove_listener(model_reference: "ReferenceType[PreTrainedModel]") -> None:
    """Undo one `add_listener`; the last one leaves the model as it was."""
    model = model_reference()
    hooks = model.__dict__.get(_ATTRIBUTE) if model is not None else None
    if model is None or hooks is None:
        return
    hooks.num_listeners -= 1
    if not hooks.num_listeners:
        for handle in hooks.handles:
            handle.remove()
        del model.__dict__[_ATTRIBUTE]


def _before(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    listener = _find_listener(args, kwargs)
    if listener is None:
        return None
    return (), listener.before_forward(model, args, kwargs)


def _after(
    _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
) -> None:
    """Called with None as output when the forward has raised."""
    listener = _find_listener(args, kwargs)
    if listener is not None:
        listener.after_forward(succeeded=output is not None)


def _find_listener(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardListener | None:
    cache = kwargs.get("past_key_values")
    candidates = (cache,) if cache is not None else args
    return next((item for item in candidates if isinstance(item, ForwardListener)), None)
