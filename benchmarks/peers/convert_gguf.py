"""A checkpoint of a Llama, in bfloat16 safetensors, as a GGUF file without a tokenizer.

    python -m benchmarks.peers.convert_gguf CHECKPOINT OUTPUT

Runs in llama.cpp's environment, which has `gguf` and no torch.
"""

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint16]

_LAYER_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def read_tensors(path: Path) -> dict[str, Words]:
    """The tensors of a safetensors file, all bfloat16, as their 16-bit words."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] != "BF16":
            raise ValueError(f"{name} is {entry['dtype']}; save the checkpoint in bfloat16")
        start, stop = entry["data_offsets"]
        words = np.memmap(
            path, np.uint16, "r", offset=8 + header_bytes + start, shape=((stop - start) // 2,)
        )
        tensors[name] = words.reshape(entry["shape"])
    return tensors


def interleaved(words: Words, num_heads: int) -> Words:
    """Rows of a query or key matrix in the order that llama.cpp's RoPE wants: pairs side by side."""
    rows, width = words.shape
    halves = words.reshape(num_heads, 2, rows // num_heads // 2, width)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, width)


def write_gguf(checkpoint: Path, output: Path) -> None:
    """Write all of it, under another name until it is whole."""
    config = json.loads((checkpoint / "config.json").read_text())
    partial = output.with_name(f"{output.name}.tmp")
    writer = gguf.GGUFWriter(partial, "llama")
    _add_fields(writer, config)
    for name, words in read_tensors(checkpoint / "model.safetensors").items():
        _add_tensor(writer, config, name, words)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(output)


def _add_fields(writer: Any, config: dict[str, Any]) -> None:  # noqa: ANN401  gguf has no types
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def _add_tensor(writer: Any, config: dict[str, Any], name: str, words: Words) -> None:  # noqa: ANN401
    parts = name.removesuffix(".weight").split(".")
    if parts[1] == "layers":
        kind = ".".join(parts[3:])
        target = f"blk.{parts[2]}.{_LAYER_TENSORS[kind]}.weight"
        if kind == "self_attn.q_proj":
            words = interleaved(words, config["num_attention_heads"])
        elif kind == "self_attn.k_proj":
            words = interleaved(words, config["num_key_value_heads"])
    else:
        target = {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[parts[1]]
    if words.ndim == 1:
        writer.add_tensor(target, (words.astype(np.uint32) << 16).view(np.float32))
    else:
        writer.add_tensor(target, words.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
