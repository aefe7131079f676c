"""The model without a KV cache: all positions at once, any dtype, differentiable.

Training uses it, and tests hold the paged decoder (model.py) against it. It is written for being obviously
right."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from midstream_runtime.engine.builtin.weights import ModelConfig, Weights


def rope_tables(
    config: ModelConfig, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, [..., head_dim], computed in float64 so that every machine has the same ones."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=positions.device) / config.head_dim
    angles = positions.to(torch.float64)[..., None] / (config.rope_theta**half)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in Hugging Face's layout: the two halves of a head are the pairs."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def dense_logits(
    config: ModelConfig, weights: Weights, ids: torch.Tensor, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits [batch, length, vocab] of `ids` [batch, length]; positions default to 0, 1, ... ."""
    batch, length = ids.shape
    embedding = weights["model.embed_tokens.weight"]
    dtype, eps, groups = (
        embedding.dtype,
        config.rms_norm_eps,
        config.num_attention_heads // config.num_key_value_heads,
    )
    if positions is None:
        positions = torch.arange(length, device=ids.device)
    cos, sin = rope_tables(config, positions, dtype)
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    hidden = F.embedding(ids, embedding)
    future = torch.full((length, length), float("-inf"), dtype=dtype, device=ids.device).triu(1)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        x = rms_norm(hidden, weights[prefix + "input_layernorm.weight"], eps)
        query, key, value = (
            F.linear(x, weights[f"{prefix}self_attn.{name}_proj.weight"])
            .view(batch, length, -1, config.head_dim)
            .transpose(1, 2)
            for name in "qkv"
        )
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(-1, -2) * config.head_dim**-0.5 + future
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, -1)
        hidden = hidden + F.linear(mixed, weights[prefix + "self_attn.o_proj.weight"])
        x = rms_norm(hidden, weights[prefix + "post_attention_layernorm.weight"], eps)
        gate = F.silu(F.linear(x, weights[prefix + "mlp.gate_proj.weight"]))
        inner = gate * F.linear(x, weights[prefix + "mlp.up_proj.weight"])
        hidden = hidden + F.linear(inner, weights[prefix + "mlp.down_proj.weight"])
    hidden = rms_norm(hidden, weights["model.norm.weight"], eps)
    return F.linear(hidden, weights.get("lm_head.weight", embedding))
