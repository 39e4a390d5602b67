# SPDX-License-Identifier: Apache-2.0
"""Bytes that a forward pass leaves behind for its backward, tensor by tensor, and what the backward needs on top.

Read off the model's code and compared with live storages in tests/dist/test_planner_memory.py. `local` is
Megatron-core's unfused layer with our RMSNorm, as on a CPU; `fused` is Transformer Engine's with a fused SwiGLU, as on
a GPU (what `_LayerNormLinear` and `SwiGLUFunction` save; not measured). Under tensor parallelism the sequence is split
too: tensors of width `hidden` hold 1 / tensor of the rows, those of heads and feed-forward 1 / tensor of the columns.

T rows of this rank (a context parallel rank's tokens of one micro-batch), b bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megatron_rl.runtime.chunks import FEED_FORWARD_ROWS, LOGIT_CHUNK
from model_providers.shape import TransformerShape

FP32 = 4
Kernels = Literal["local", "fused"]


@dataclass(frozen=True, slots=True)
class ActivationSplit:
    """How a layer is spread over ranks, and how it computes. `element` is the bytes of a parameter's element."""

    tensor: int = 1
    context: int = 1
    context_comm: str = "all_gather"
    recompute: str = "none"
    element: int = 2
    kernels: Kernels = "fused"


@dataclass(frozen=True, slots=True)
class Widths:
    """Columns of this rank: queries, keys (as many values), the whole projection, feed-forward, heads."""

    q: float
    kv: float
    fused: float
    ffn: float
    heads: float
    groups: int


def widths(shape: TransformerShape, tensor: int) -> Widths:
    """With fewer key/value heads than ranks, each rank holds one whole."""
    groups = max(1, shape.num_groups // tensor)
    q, kv = shape.num_heads * shape.head_dim / tensor, float(groups * shape.head_dim)
    whole = (shape.num_heads + 2 * shape.num_groups) * shape.head_dim
    fused = whole / tensor if shape.num_groups >= tensor else whole / shape.num_groups
    return Widths(q, kv, fused, shape.ffn_hidden_size / tensor, shape.num_heads / tensor, groups)


# What a last layer keeps only of the rows that predict something (model_providers.last_layer).
OF_PREDICTING_ROWS = frozenset(
    {
        "rows before feed-forward",
        "norm before feed-forward",
        "input of feed-forward",
        "feed-forward",
        "q",
        "out",
        "lse",
        "experts",
        "router",
    }
)


def layer_saved(shape: TransformerShape, split: ActivationSplit) -> dict[str, float]:
    """{what: bytes a row} that one layer keeps."""
    hidden = shape.hidden_size / split.tensor
    if split.recompute == "full":
        return {"layer input": hidden * split.element}
    saved = {
        "input norm": _norm(hidden, 1 / split.tensor, split),
        "input of projection": hidden * split.element,
        "rotary": 4 * shape.head_dim * split.element,  # cosines and sines, made anew for queries and for keys
        **_attention(shape, split),
    }
    if split.recompute == "selective" and not shape.num_experts:
        return saved | {"rows before feed-forward": hidden * split.element}
    saved |= {"norm before feed-forward": _norm(hidden, 1 / split.tensor, split)}
    saved |= {"input of feed-forward": hidden * split.element}
    return saved if split.recompute == "selective" else saved | _feed_forward(shape, split)


def last_layer_bytes(shape: TransformerShape, split: ActivationSplit, rows: int, predicting: int) -> float:
    """Kept by the last layer for `rows` rows, of which `predicting` are computed to the end."""
    saved = layer_saved(shape, split).items()
    return sum(size * (predicting if what in OF_PREDICTING_ROWS else rows) for what, size in saved)


def layer_bytes(shape: TransformerShape, split: ActivationSplit) -> float:
    """A row of one layer."""
    return sum(layer_saved(shape, split).values())


def _norm(width: float, count: float, split: ActivationSplit) -> float:
    """Of `count` norms over `width` columns in all. Ours keeps its input in fp32, twice where that is a copy, and the
    normalised values; a fused one its input."""
    if split.kernels == "fused":
        return width * split.element + count * FP32
    copies = 1 if split.element == FP32 else 2
    return width * (copies * FP32 + split.element) + count * FP32


def _attention(shape: TransformerShape, split: ActivationSplit) -> dict[str, float]:
    """q and k after rotary, v, out, log-sum-exp."""
    at, b = widths(shape, split.tensor), split.element
    saved = {"q": at.q * b, "k, v": 2 * at.kv * b, "out": at.q * b, "lse": at.heads * FP32}
    if split.context_comm == "a2a" and split.context > 1:
        # All rows, some heads: as many elements, but for shared key/value heads, and a second `out`.
        saved["k, v"] = 2 * split.context * _kv_heads_of_rank(at, split.context) * shape.head_dim * b
        saved["out"] *= 2
    if shape.qk_norm:
        saved["q, k norms"] = _qk_norms(at, split)
    return saved


def _kv_heads_of_rank(at: Widths, context: int) -> int:
    """Key/value heads with which a rank computes that has some heads of all rows (exchange.heads_of_rank)."""
    per_rank, per_group = at.heads / context, at.heads / at.groups
    if per_rank >= per_group:
        return int(per_rank // per_group) if per_rank % per_group == 0 else int(per_rank)
    return 1 if per_group % per_rank == 0 else int(per_rank)


def _qk_norms(at: Widths, split: ActivationSplit) -> float:
    """Their inputs are fp32 copies; or q, copied out of the projection, and k as a view that keeps all of it."""
    b, roots = split.element, (at.heads + at.groups) * FP32
    if split.kernels == "local" and b != FP32:
        return (at.q + at.kv) * (2 * FP32 + b) + roots
    copied = at.q * b if at.groups > 1 else 0
    normalised = (at.q + at.kv) * b if split.kernels == "local" else 0
    return at.fused * b + copied + normalised + roots


def _feed_forward(shape: TransformerShape, split: ActivationSplit) -> dict[str, float]:
    """Unfused: gate and up, silu(gate), up + 0, their product. Fused: gate and up, the product."""
    b, ffn = split.element, shape.ffn_hidden_size / split.tensor
    if not shape.num_experts:
        return {"feed-forward": (5 if split.kernels == "local" else 3) * ffn * b}
    times = shape.experts_per_token / split.tensor  # rows are split, experts are not
    per_row = (6 if split.kernels == "local" else 4) * shape.ffn_hidden_size + 2 * shape.hidden_size
    return {"experts": times * per_row * b, "router": (shape.num_experts * 2 * FP32) / split.tensor}


# ------------------------------------------------------------------------------------------- beside and beyond a layer


def head_saved(shape: TransformerShape, split: ActivationSplit, responses: int) -> float:
    """On the last stage, of rows that predict something: the final norm, and one hidden state a response token."""
    hidden = shape.hidden_size / split.tensor
    return responses * (_norm(hidden, 1 / split.tensor, split) + shape.hidden_size * split.element)


def gather_buffer(shape: TransformerShape, split: ActivationSplit, rows: int) -> float:
    """All rows of a layer's input, gathered for a column parallel linear. Megatron-core keeps one for ever."""
    return rows * shape.hidden_size * split.element if split.tensor > 1 else 0.0


def rotary_table(shape: TransformerShape, split: ActivationSplit, rows: int) -> float:
    """Angles, which full recomputation keeps for its second forward pass."""
    return rows * shape.head_dim * FP32 if split.recompute == "full" else 0.0


def exchange_bytes(shape: TransformerShape, split: ActivationSplit, all_rows: int, backward: bool) -> float:
    """Keys and values that stand here for the time of one attention call: of all ranks, or (ring) of two."""
    if split.context == 1:
        return 0.0
    at = widths(shape, split.tensor)
    bytes_a_value = split.element + (FP32 if backward else 0)
    if split.context_comm == "a2a":
        return 2 * all_rows / split.context * (at.q + 2 * at.kv) * split.element
    share = 1.0 if split.context_comm == "all_gather" else 2 / split.context
    return share * all_rows * 2 * at.kv * bytes_a_value


def last_stage_working(
    shape: TransformerShape, split: ActivationSplit, rows: int, all_rows: int, predicting: int, num_layers: int
) -> float:
    """Beyond what is kept, in the backward of a last stage of `num_layers`. The last layer comes first, and has freed
    what it kept when it is the turn of one that computes all rows. Two gradients of the residual stream stand."""
    most = backward_working(shape, split, rows, all_rows, predicting)
    if num_layers > 1:
        freed = last_layer_bytes(shape, split, rows, predicting)
        most = max(most, backward_working(shape, split, rows, all_rows) - freed)
    return most + rows * shape.hidden_size / split.tensor * split.element


def backward_working(
    shape: TransformerShape, split: ActivationSplit, rows: int, all_rows: int, predicting: int | None = None
) -> float:
    """Beyond what is kept, while one layer goes backwards: what it computes again, and the larger of its attention and
    its feed-forward network, which in a last layer has `predicting` rows."""
    fed = rows if predicting is None else predicting
    at, b = widths(shape, split.tensor), split.element
    hidden = shape.hidden_size / split.tensor
    kept = sum(_feed_forward(shape, split).values())
    gradients = 2 * _inner_width(shape, split) * b  # of gate and up
    attention = rows * (at.q + 2 * at.kv) * (b + FP32) + fed * at.q * b
    attention += exchange_bytes(shape, split, all_rows, backward=True)
    if split.recompute == "none" or shape.num_experts:
        again = replace(split, recompute="none")
        attention -= fed * kept  # freed before attention's turn
        feed_forward = fed * gradients
    else:
        again = replace(split, recompute="selective")
        around = _norm(hidden, 1 / split.tensor, split) + 2 * hidden * b
        feed_forward = min(fed, FEED_FORWARD_ROWS) * (kept + gradients + around)
    remade = last_layer_bytes(shape, again, rows, fed) - last_layer_bytes(shape, split, rows, fed)
    stream = rows * hidden * (b + (FP32 if b != FP32 else 0))
    return remade + stream + _gathered(shape, split, rows) + max(attention, feed_forward)


def scoring_working(shape: TransformerShape, split: ActivationSplit, rows: int, all_rows: int) -> float:
    """While one layer is computed without gradients. Four tensors of the residual stream stand beside it, and the table
    of rotary angles."""
    at, b = widths(shape, split.tensor), split.element
    stream = rows * (4 * shape.hidden_size / split.tensor * b + shape.head_dim * FP32)
    attention = rows * (at.fused + 2 * at.q + 2 * at.kv) * b + rows * at.q * FP32
    attention += exchange_bytes(shape, split, all_rows, backward=False)
    at_a_time = rows if shape.num_experts else min(rows, FEED_FORWARD_ROWS)
    feed_forward = (5 if split.kernels == "local" else 3) * at_a_time * _inner_width(shape, split) * b
    return stream + _gathered(shape, split, rows) + max(attention, feed_forward)


def _gathered(shape: TransformerShape, split: ActivationSplit, rows: int) -> float:
    """The input of a column parallel linear; with Transformer Engine its gradient too."""
    return (1 if split.kernels == "local" else 2) * gather_buffer(shape, split, rows)


def _inner_width(shape: TransformerShape, split: ActivationSplit) -> float:
    """Columns of the feed-forward network, of all experts of a row."""
    if shape.num_experts:
        return shape.experts_per_token / split.tensor * shape.ffn_hidden_size
    return widths(shape, split.tensor).ffn


def logits_working(
    shape: TransformerShape, split: ActivationSplit, responses: int, largest_param: int, backward: bool
) -> float:
    """One chunk of logits: in the parameters' type, and twice in fp32 (biased, scaled); in the backward also the
    gradient of the output matrix before it reaches the fp32 buffer. No layer is computed meanwhile."""
    rows = min(LOGIT_CHUNK, responses)
    logits = rows * shape.vocab_size / split.tensor * (split.element + 2 * FP32)
    return logits + (largest_param * split.element if backward else 0)
