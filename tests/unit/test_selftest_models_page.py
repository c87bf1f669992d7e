"""docs/models.md says what the self-test finds; run this file to write the table anew."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkeep.hf.geometry import ModelGeometry, measure_geometry, text_config
from kvkeep.hf.selftest import SelfTest, choose_mode
from kvkeep.native import Kernels, load_kernels
from kvkeep.spec import GroupSpec, LayerKind
from kvkeep.testing.tiny_models import ARCHITECTURES, build_tiny

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- architectures -->\n", "<!-- end of architectures -->\n"

SPECIAL = {
    "qwen2": "biases on keys",
    "qwen3": "normalised queries and keys",
    "phi3": "one projection for queries, keys and values; partial RoPE",
    "gemma2": "softcap on scores",
    "gemma3": "two RoPE bases",
    "gpt2": "learned positions",
    "gpt_oss": "attention sinks; mixture of experts",
    "mixtral": "mixture of experts",
    "qwen3_moe": "mixture of experts",
    "deepseek_v3": "MLA: a latent and a rotated key are stored",
    "llama4": "chunks; queries scaled by position; mixture of experts",
    "cohere2": "full layers without positions",
    "falcon": "attention of its own",
    "falcon_alibi": "attention of its own; ALiBi; one key/value head",
    "bloom": "attention of its own; ALiBi",
    "qwen3_next": "gated delta rule; mixture of experts",
    "lfm2": "short convolutions",
}


def group_text(group: GroupSpec) -> str:
    """Kind, window and shape of a group, and how many layers it has."""
    layers = f"{len(group.layers)} layer{'s' if len(group.layers) > 1 else ''}"
    if group.kind is LayerKind.RECURRENT:
        return f"recurrent ({layers})"
    shape = f"{group.k_heads}x{group.k_dim}"
    if (group.v_heads, group.v_dim) != (group.k_heads, group.k_dim):
        shape += f" and {group.v_heads}x{group.v_dim}"
    window = "" if group.window is None else f" {group.window}"
    return f"{group.kind.value}{window}, {shape} ({layers})"


def special_text(name: str, geometry: ModelGeometry) -> str:
    """What is worth knowing, with what the geometry says itself."""
    parts = [SPECIAL[name]] if name in SPECIAL else []
    if geometry.consumers:
        parts.append(f"{len(geometry.consumers)} layers reuse the K/V of others")
    return "; ".join(parts)


def row(name: str) -> str:
    """One line of the table."""
    model = build_tiny(name)
    geometry = measure_geometry(model, 8)
    kernels = load_kernels()
    verdict: SelfTest = choose_mode(
        model, geometry, kernels=kernels if isinstance(kernels, Kernels) else None
    )
    groups = "; ".join(group_text(group) for group in geometry.spec.groups)
    cells = (
        text_config(model).model_type,
        verdict.mode.value,
        groups,
        special_text(name, geometry),
    )
    return f"| {name} | `{cells[0]}` | {cells[1]} | {cells[2]} | {cells[3]} |".replace(
        "|  |", "| |"
    )


def table() -> Iterator[str]:
    """All lines of the table."""
    yield "| tiny model | `model_type` | mode | KV groups | special |"
    yield "|---|---|---|---|---|"
    yield from map(row, ARCHITECTURES)


def test_the_page_says_what_the_self_test_finds() -> None:
    """Modes and groups in the document are those of the code, where the kernels are."""
    if not isinstance(load_kernels(), Kernels):
        pytest.skip("the compiled kernels are not installed")
    text = PAGE.read_text(encoding="utf-8")

    written = text[text.index(BEGIN) + len(BEGIN) : text.index(END)]

    assert written.splitlines() == list(table())


def rewrite() -> None:
    """Put the table of this machine into the page."""
    text = PAGE.read_text(encoding="utf-8")
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    PAGE.write_text(head + "\n".join(table()) + "\n" + tail, encoding="utf-8")


if __name__ == "__main__":
    rewrite()
