"""Model folder on disk: Llama's configuration, safetensors weights, fingerprint.

The folder is laid out as Hugging Face lays out a Llama (`config.json`, `model.safetensors`, same tensor
names), so `LlamaForCausalLM.from_pretrained` opens it too, which is how the engine is checked. The
safetensors format is a little-endian u64 header length, a JSON header and raw tensors; reading it takes ten
lines and no dependency."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

Weights = dict[str, torch.Tensor]

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class ModelConfig:
    """The fields of a Llama's config.json that decide its arithmetic."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool

    @classmethod
    def load(cls, path: Path) -> ModelConfig:
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{name: data[name] for name in cls.__dataclass_fields__})

    def save(self, path: Path, **extra: Any) -> None:
        fixed = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": "float16",
        }
        path.write_text(json.dumps({**fixed, **asdict(self), **extra}, indent=2) + "\n", encoding="utf-8")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor."""
        hidden, heads = self.hidden_size, self.num_attention_heads * self.head_dim
        kv_heads, inner = self.num_key_value_heads * self.head_dim, self.intermediate_size
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            found |= {
                prefix + "input_layernorm.weight": (hidden,),
                prefix + "self_attn.q_proj.weight": (heads, hidden),
                prefix + "self_attn.k_proj.weight": (kv_heads, hidden),
                prefix + "self_attn.v_proj.weight": (kv_heads, hidden),
                prefix + "self_attn.o_proj.weight": (hidden, heads),
                prefix + "post_attention_layernorm.weight": (hidden,),
                prefix + "mlp.gate_proj.weight": (inner, hidden),
                prefix + "mlp.up_proj.weight": (inner, hidden),
                prefix + "mlp.down_proj.weight": (hidden, inner),
            }
        found["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            found["lm_head.weight"] = (self.vocab_size, hidden)
        return found


def random_weights(config: ModelConfig, seed: int, std: float = 0.05) -> Weights:
    """Untrained float32 weights, the same for a seed everywhere: for the start of training and for tests."""
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}
    for name, shape in config.shapes().items():
        if name.endswith("norm.weight"):
            weights[name] = torch.ones(shape)
        else:
            weights[name] = torch.randn(shape, generator=generator) * std
    return weights


def save_weights(weights: Weights, path: Path) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    chunks: list[bytes] = []
    at = 0
    for name, tensor in weights.items():
        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + len(raw)],
        }
        chunks.append(raw)
        at += len(raw)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(chunks))


def load_weights(path: Path) -> Weights:
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    weights: Weights = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = (8 + length + offset for offset in entry["data_offsets"])
        flat = torch.frombuffer(raw, dtype=torch.uint8, count=last - first, offset=first)
        weights[name] = flat.view(_DTYPES[entry["dtype"]]).view(entry["shape"]).clone()
    return weights


def fingerprint(config: ModelConfig, weights: Weights) -> str:
    """Name of these weights: two pods with the same one compute the same KV from the same ids."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for name in sorted(weights):
        digest.update(name.encode() + b"\0")
        digest.update(weights[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
