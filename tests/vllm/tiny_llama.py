"""Makes a tiny Llama with random weights for vLLM's tests: `python tiny_llama.py FOLDER [SEED]`, in vLLM's environment.

Weights are drawn ten times wider than a fresh model's (initializer_range 0.3): with the usual 0.02 a random model falls
into a loop of two tokens and any answer equals any other. With 0.3 nearly each token differs, so that one wrong KV
block changes all that follows. The tokenizer is byte-level with merges learnt from the licence: some of its ids are
parts of characters only, as in every real one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LICENCE = Path(__file__).resolve().parents[2] / "LICENSE"
VOCABULARY = 512
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def make(folder: Path, seed: int = 1) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.float32)
    model.save_pretrained(folder)
    bpe = ByteLevelBPETokenizer()
    bpe.train([str(LICENCE)], vocab_size=VOCABULARY, min_frequency=2, special_tokens=["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
