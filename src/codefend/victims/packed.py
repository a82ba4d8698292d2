"""A Llama decoder over packed rows: equal to the Transformers model, without computing unused outputs.

Rows of different lengths are concatenated, so nothing is computed for padding; the common start of all rows is computed
once; and the last layer computes only the queried positions. Projections may be any modules (LoRA included), on any
device.

Shape legend: N packed positions of all rows, R rows, L queries of the longest row, K keys of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class AttentionPlan:
    """Which packed queries attend to which packed keys, as padded indices."""

    positions: Tensor  # [Nq] packed index of each query
    queries: Tensor  # [R, L] number of each query among those; padding repeats the row's first
    places: Tensor  # [Nq] where each query lies in the padded [R * L]
    keys: Tensor  # [R, K] packed index of each key; padding is masked
    mask: Tensor  # [R, 1, L, K] 0 or -inf


def plan_attention(lengths: Sequence[int], reads: Sequence[range], device: torch.device) -> AttentionPlan:
    """Plan causal attention in which every row but the first continues the first.

    ``lengths`` of the packed rows; ``reads``: the queried positions of each row, counted within it (may be none).
    """
    positions: list[int] = []
    queries, keys, reach, start = [], [], [], 0
    for row, (length, read) in enumerate(zip(lengths, reads, strict=True)):
        before = 0 if row == 0 else lengths[0]
        if len(read):
            keys.append(torch.tensor([*range(before), *range(start, start + length)]))
            queries.append(torch.arange(len(positions), len(positions) + len(read)))
            reach.append(before + torch.tensor(read))  # keys up to here, in the row's own count
            positions += [start + place for place in read]
        start += length
    real = pad_sequence([torch.ones_like(q, dtype=torch.bool) for q in queries], batch_first=True)
    first = torch.stack([q[0] for q in queries])[:, None]
    visible = torch.arange(max(map(len, keys))) <= pad_sequence(reach, batch_first=True)[:, :, None]
    parts = (
        torch.tensor(positions),
        torch.where(real, pad_sequence(queries, batch_first=True), first),
        real.flatten().nonzero().flatten(),
        pad_sequence(keys, batch_first=True),
        torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)[:, None],
    )
    return AttentionPlan(*(part.to(device) for part in parts))


def answer_states(llm: Any, rows: Sequence[Tensor], reads: Sequence[range]) -> Tensor:
    """Final hidden states ``[Nq, D]`` at the positions that ``reads`` names, row by row.

    ``rows`` are embeddings ``[L_i, D]``; every row but the first continues the first and attends to it.
    ``llm`` is a LlamaForCausalLM without sliding windows or biases in the mask. Differentiable once.
    """
    lengths, device = [len(row) for row in rows], rows[0].device
    x = torch.cat(list(rows))
    everywhere = plan_attention(lengths, [range(length) for length in lengths], device)
    starts = [0] + [lengths[0]] * (len(rows) - 1)
    places = torch.cat([torch.arange(s, s + n, device=device) for s, n in zip(starts, lengths, strict=True)])
    cos, sin = (part[0] for part in llm.model.rotary_emb(x, places[None]))  # each [N, head]
    *layers, last = llm.model.layers
    for layer in layers:
        x = _layer(layer, x, x, (cos, sin), (cos, sin), everywhere)
    last_plan = plan_attention(lengths, reads, device)
    queried = last_plan.positions
    x = _layer(last, x, x[queried], (cos, sin), (cos[queried], sin[queried]), last_plan)
    states: Tensor = llm.model.norm(x)
    return states


Rotation = tuple[Tensor, Tensor]  # cosines and sines of each position, [N, head]


def _layer(
    layer: Any, x: Tensor, query: Tensor, rotation: Rotation, query_rotation: Rotation, plan: AttentionPlan
) -> Tensor:
    """One decoder layer: keys and values everywhere (``x``), the rest only for the queried positions."""
    attention, norm = layer.self_attn, layer.input_layernorm
    h = norm(x)
    q = attention.q_proj(h if query is x else norm(query))
    heads = _Attend.apply(  # type: ignore[no-untyped-call]
        q,
        attention.k_proj(h),
        attention.v_proj(h),
        rotation,
        query_rotation,
        plan,
        attention.head_dim,
        attention.scaling,
    )
    query = query + attention.o_proj(heads)
    out: Tensor = query + layer.mlp(layer.post_attention_layernorm(query))
    return out


def _rotate(x: Tensor, rotation: Rotation, *, back: bool = False) -> Tensor:
    """Rotary embedding of ``[N, heads, head]`` (Su et al. 2021, in separate halves as in Llama), or its inverse."""
    cos, sin = (part[:, None, : x.shape[-1] // 2].to(x.dtype) for part in rotation)
    first, second = x.chunk(2, dim=-1)
    sin = -sin if back else sin
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class _Attend(torch.autograd.Function):
    """Grouped-query attention of packed positions, rotary embedding included.

    With its own backward pass: at some forty positions a row, autograd's gathering, softmax and scattering cost more
    than the products.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotation: Rotation,
        query_rotation: Rotation,
        plan: AttentionPlan,
        width: int,
        scale: float,
    ) -> Tensor:
        queries = _rotate(q.view(len(q), -1, width), query_rotation)
        keys, values = _rotate(k.view(len(k), -1, width), rotation), v.view(len(v), -1, width)
        groups = keys.shape[1]
        padded_q = _fold(queries[plan.queries], groups)  # [R * groups, heads per group * L, width]
        padded_k, padded_v = (part[plan.keys].transpose(1, 2).flatten(0, 1) for part in (keys, values))
        weights = _scores(padded_q, padded_k, plan.mask, groups, scale).softmax(-1)
        out = _unfold(weights @ padded_v, plan)
        ctx.save_for_backward(padded_q, padded_k, padded_v, weights)
        ctx.extra = (rotation, query_rotation, plan, groups, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        rotation, query_rotation, plan, groups, scale = ctx.extra
        count, width = len(rotation[0]), q.shape[-1]
        spread = grad.new_zeros(plan.queries.numel(), grad.shape[1])
        spread[plan.places] = grad
        grad = _fold(spread.view(*plan.queries.shape, -1, width), groups)
        slope = torch._softmax_backward_data(grad @ _t(v), weights, -1, weights.dtype) * scale
        d_q = _unfold(slope @ k, plan).view(len(plan.places), -1, width)
        d_k, d_v = (_gather(part, plan, groups, count) for part in (_t(slope) @ q, _t(weights) @ grad))
        d_q, d_k = _rotate(d_q, query_rotation, back=True), _rotate(d_k, rotation, back=True)
        return d_q.flatten(1), d_k.flatten(1), d_v.flatten(1), None, None, None, None, None


def _t(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _scores(q: Tensor, k: Tensor, mask: Tensor, groups: int, scale: float) -> Tensor:
    scores = torch.bmm(q, _t(k)).mul_(scale)
    rows, _, length, keys = mask.shape
    scores.view(rows, groups, -1, length, keys).add_(mask[:, :, None])
    return scores


def _fold(x: Tensor, groups: int) -> Tensor:
    """``[R, L, heads, width]`` to ``[R * groups, heads per group * L, width]``, grouped by shared keys."""
    rows, length, heads, width = x.shape
    return x.transpose(1, 2).reshape(rows * groups, heads // groups * length, width)


def _unfold(x: Tensor, plan: AttentionPlan) -> Tensor:
    """The reverse of `_fold`, packed: ``[Nq, heads * width]``."""
    rows, length = plan.queries.shape
    heads = x.view(rows, -1, length, x.shape[-1]).transpose(1, 2)
    return heads.reshape(rows * length, -1)[plan.places]


def _gather(x: Tensor, plan: AttentionPlan, groups: int, count: int) -> Tensor:
    """Gradients of padded keys ``[R * groups, K, width]`` added up per packed position, ``[N, groups, width]``."""
    rows, keys = plan.keys.shape
    flat = x.view(rows, groups, keys, -1).transpose(1, 2).reshape(rows * keys, -1)
    total = x.new_zeros(count, flat.shape[1]).index_add_(0, plan.keys.flatten(), flat)
    return total.view(count, groups, -1)


def answer_logits(llm: Any, rows: Sequence[Tensor], reads: Sequence[range]) -> Tensor:
    """Logits ``[Nq, V]`` at the positions that ``reads`` names."""
    logits: Tensor = F.linear(answer_states(llm, rows, reads), llm.lm_head.weight)
    return logits
