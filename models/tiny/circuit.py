"""Starting weights that already hold a rough induction circuit.

Small models meet a long plateau before they learn to look back in their
context.  We skip it: the four heads of layer 0 start out attending one to four
tokens back, and those of layer 1 finding an earlier copy of the last one to four
tokens and reading what followed it.  Everything is trained on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.tiny.network import Attention, Decoder, Shape

CONSTANT_DIMS = 8  # embedding dimensions that hold the same value for every token
CONSTANT_VALUE = 4.0  # in units of the embedding spread
EMBEDDING_SPREAD = 0.2
SHARP_PAIRS = 6  # fast rotary pairs that tell neighbouring positions apart
LOOK_BACK_GAIN, LOOK_UP_GAIN = 3.0, 3.2
# What is copied must outweigh what layer 0 wrote, or it does not reach the output.
WRITE_SCALE, COPY_SCALE = 2 * EMBEDDING_SPREAD, 6 * EMBEDDING_SPREAD
# The attending heads of layer 1 compare this many of the last tokens each.
COMPARED = (1, 2, 3, 4)


def _frame(rows: int, width: int) -> Tensor:
    """Orthonormal rows that ignore the constant dimensions."""
    frame = torch.zeros(rows, width)
    gaussian = torch.randn(width - CONSTANT_DIMS, rows)
    frame[:, CONSTANT_DIMS:] = torch.linalg.qr(gaussian).Q.T
    return frame


def _separate_frames(shape: Shape) -> list[Tensor]:
    """One frame per head, orthogonal to each other, so that what heads write stays apart."""
    rows = (shape.hidden_size - CONSTANT_DIMS) // shape.num_attention_heads
    together = _frame(rows * shape.num_attention_heads, shape.hidden_size)
    unused = torch.zeros(shape.head_dim - rows, shape.hidden_size)
    return [torch.cat((frame, unused)) for frame in together.split(rows)]


def _offset_pattern(shape: Shape, offset: int) -> Tensor:
    """Query or key whose score peaks where query minus key position is ``offset``."""
    half = shape.head_dim // 2
    pattern = torch.zeros(shape.head_dim)
    for pair in range(SHARP_PAIRS):
        angle = torch.tensor(offset * shape.rope_theta ** (-pair / half))
        pattern[pair] = angle.cos()
        pattern[half + pair] = -angle.sin()
    return pattern


def _slow_rows(shape: Shape, matrix: Tensor) -> Tensor:
    """Weight rows towards the slow rotary pairs, whose match survives distance."""
    half = shape.head_dim // 2
    ramp = torch.linspace(-1.0, 1.0, half).mul(6).sigmoid()
    return matrix * torch.cat((ramp, ramp))[:, None]


def _set_rows(linear: nn.Linear, head: int, width: int, rows: Tensor) -> None:
    linear.weight.data[head * width : (head + 1) * width] = rows


def _set_columns(linear: nn.Linear, head: int, width: int, columns: Tensor) -> None:
    linear.weight.data[:, head * width : (head + 1) * width] = columns


def _look_back(attention: Attention, shape: Shape, read: Tensor, writes: list[Tensor]) -> None:
    """Head h copies the token h + 1 places back into its own subspace."""
    width = shape.head_dim

    def constant(pattern: Tensor) -> Tensor:
        rows = 0.02 * torch.randn(width, shape.hidden_size)
        rows[:, :CONSTANT_DIMS] += pattern[:, None]
        return rows

    for group in range(shape.num_key_value_heads):
        _set_rows(attention.k_proj, group, width, constant(_offset_pattern(shape, 0)))
        _set_rows(attention.v_proj, group, width, read)
    for head, write in enumerate(writes):
        _set_rows(attention.q_proj, head, width, constant(_offset_pattern(shape, head + 1)))
        _set_columns(attention.o_proj, head, width, WRITE_SCALE * write.T)
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight.fill_(LOOK_BACK_GAIN)


def _look_up(attention: Attention, shape: Shape, read: Tensor, writes: list[Tensor]) -> None:
    """Head h compares the last COMPARED[h] tokens with those before a key; it copies the key."""
    width = shape.head_dim
    group = shape.num_attention_heads // shape.num_key_value_heads
    mixers = [torch.linalg.qr(torch.randn(width, width)).Q for _ in writes]
    # What stood n places before the query, and n + 1 places before the key, must agree.
    asked = [_slow_rows(shape, m @ f) for m, f in zip(mixers, [read, *writes], strict=False)]
    kept = [_slow_rows(shape, m @ f) for m, f in zip(mixers, writes, strict=True)]
    copies = _frame(shape.num_key_value_heads * width, shape.hidden_size)
    for head, compared in enumerate(COMPARED):
        query = torch.stack(asked[:compared]).sum(0)
        _set_rows(attention.q_proj, head, width, query)
        copy = copies[head // group * width :][:width]
        _set_columns(attention.o_proj, head, width, COPY_SCALE * copy.T)
    for kv_head in range(shape.num_key_value_heads):
        longest = max(COMPARED[kv_head * group : (kv_head + 1) * group])
        _set_rows(attention.k_proj, kv_head, width, torch.stack(kept[:longest]).sum(0))
        _set_rows(attention.v_proj, kv_head, width, copies[kv_head * width :][:width])
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight.fill_(LOOK_UP_GAIN)


@torch.no_grad()
def plant(decoder: Decoder) -> None:
    """Write the circuit into a freshly drawn decoder."""
    shape = decoder.shape
    table = decoder.model.embed_tokens.weight
    table.normal_(std=EMBEDDING_SPREAD)
    table[:, :CONSTANT_DIMS] = CONSTANT_VALUE * EMBEDDING_SPREAD
    decoder.model.norm.weight.fill_(0.3)
    read = _frame(shape.head_dim, shape.hidden_size)
    writes = _separate_frames(shape)
    first, second = decoder.model.layers[0], decoder.model.layers[1]
    _look_back(first.self_attn, shape, read, writes)  # type: ignore[arg-type]
    _look_up(second.self_attn, shape, read, writes)  # type: ignore[arg-type]
