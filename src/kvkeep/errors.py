"""The errors a caller can meet.

    KVKeepError
    ├── ConfigError (ValueError)       a setting has a value it cannot have
    ├── RequestError (ValueError)      a request cannot be served as it was asked
    ├── CapacityError                  memory is too small for what must be held at once
    │   └── PinCapacityError           pins would keep more than they may
    ├── CorruptBlockError              stored bytes are not what they claim to be
    ├── CodecError                     a KV format cannot encode or decode this
    ├── TierError                      a medium below the device failed
    ├── UnsupportedModelError          a model cannot be served right, with the measured error
    ├── SamplingError                  the model's logits cannot be sampled
    └── KernelError                    a CPU kernel refused its arguments, or found no memory

Every message names the field, its value and the remedy. "Not found" and "no room" on the hot path are
return values, never errors.
"""

__all__ = [
    "CapacityError",
    "CodecError",
    "ConfigError",
    "CorruptBlockError",
    "KVKeepError",
    "KernelError",
    "PinCapacityError",
    "RequestError",
    "SamplingError",
    "TierError",
    "UnsupportedModelError",
]


class KVKeepError(Exception):
    """Base of all errors that kvkeep raises on purpose."""


class ConfigError(KVKeepError, ValueError):
    """A setting has a value it cannot have."""


class RequestError(KVKeepError, ValueError):
    """A request cannot be served as it was asked."""


class CapacityError(KVKeepError):
    """Memory is too small for what must be held at once."""


class PinCapacityError(CapacityError):
    """Pins would keep more than they may."""


class CorruptBlockError(KVKeepError):
    """Stored bytes are not what they claim to be."""


class CodecError(KVKeepError):
    """A KV format cannot encode or decode this."""


class TierError(KVKeepError):
    """A medium below the device failed."""


class UnsupportedModelError(KVKeepError):
    """A model cannot be served right; the message carries the measured error."""


class SamplingError(KVKeepError):
    """The model's logits cannot be sampled (NaN, or nothing left to choose from)."""


class KernelError(KVKeepError):
    """A CPU kernel refused its arguments before it touched memory, or found no memory to work in."""
