"""Which engines are compared, what starts each, and which of them are fair to compare."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["ENGINES", "FIELDS", "RIVALS", "ROOT", "USUAL", "EngineSpec", "Field"]

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """A worker: its module, the environment it runs in (None: this one), its model and its K/V format.

    `kv_bits` is what one number of K/V takes, scales included, for what memory it will need. `base_share` is
    its memory before the first request, as a multiple of the bytes of the weights.
    """

    name: str
    label: str
    module: str
    environment: str | None = None
    model: str = "checkpoint"
    kv: str = ""
    kv_bits: float = 16
    base_share: float = 1.1
    base_bytes: int = 700 * 2**20
    environ: tuple[tuple[str, str], ...] = ()


def _worker(name: str) -> str:
    return f"benchmarks.peers.worker_{name}"


ENGINES = {
    engine.name: engine
    for engine in (
        EngineSpec(name="kvkeep", label="kvkeep", module=_worker("kvkeep")),
        EngineSpec(name="transformers", label="transformers", module=_worker("transformers")),
        EngineSpec(
            name="openvino",
            label="OpenVINO GenAI",
            module=_worker("openvino"),
            environment="openvino",
            model="openvino",
            kv="bf16",
            base_share=1.2,
        ),
        EngineSpec(
            name="llamacpp",
            label="llama.cpp",
            module=_worker("llamacpp"),
            environment="llamacpp",
            model="gguf",
            kv="f16",
        ),
        EngineSpec(
            name="vllm",
            label="vLLM",
            module=_worker("vllm"),
            environment="vllm",
            base_share=1.6,
            base_bytes=1500 * 2**20,
        ),
        EngineSpec(
            name="kvkeep-int8",
            label="kvkeep",
            module=_worker("kvkeep"),
            kv="int8",
            kv_bits=8.5,
        ),
        EngineSpec(
            name="openvino-u8",
            label="OpenVINO GenAI",
            module=_worker("openvino"),
            environment="openvino",
            model="openvino",
            kv="u8",
            kv_bits=9,
            base_share=1.2,
        ),
        EngineSpec(
            name="llamacpp-q8",
            label="llama.cpp",
            module=_worker("llamacpp"),
            environment="llamacpp",
            model="gguf",
            kv="q8_0",
            kv_bits=8.5,
        ),
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """Engines whose K/V have the same number of bits: `ours` against each of `peers`.

    Late ones come when all others are measured.
    """

    name: str
    ours: str
    peers: tuple[str, ...]
    has_first_tokens: bool = True
    is_late: bool = False


FIELDS = (
    Field(
        name="16-bit K/V",
        ours="kvkeep",
        peers=("transformers", "openvino", "llamacpp"),
    ),
    Field(
        name="8-bit K/V",
        ours="kvkeep-int8",
        peers=("openvino-u8", "llamacpp-q8"),
        has_first_tokens=False,
    ),
    Field(name="16-bit K/V", ours="kvkeep", peers=("vllm",), is_late=True),
)

# What takes part unless others are asked for.
USUAL = tuple(name for name in ENGINES if name != "llamacpp-q8")

# kvkeep is to be no slower than these.
RIVALS = frozenset({"openvino", "llamacpp", "openvino-u8", "llamacpp-q8"})
