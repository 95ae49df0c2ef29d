"""Small models of other kinds than the embedded policy, as folders to load."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from rlvr.policy import TINY


def shared_keys(folder: Path) -> str:
    """The embedded policy, with each of its heads as two that share a key head, at half the weight."""
    old = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float64)
    size = old.config.head_dim
    config = LlamaConfig(**{**old.config.to_dict(), "num_attention_heads": 6, "dtype": "float64"})
    new = LlamaForCausalLM(config).double()
    weights = old.state_dict()
    for name, weight in weights.items():
        if name.endswith("q_proj.weight"):
            weights[name] = weight.unflatten(0, (-1, size)).repeat_interleave(2, dim=0).flatten(0, 1)
        elif name.endswith("o_proj.weight"):
            weights[name] = weight.unflatten(1, (-1, size)).repeat_interleave(2, dim=1).flatten(1, 2) / 2
    new.load_state_dict(weights)
    new.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return str(folder)


def convolutional(folder: Path) -> str:
    """A model with layers that mix neighbouring tokens, whatever sequence they are of."""
    config = Lfm2Config(
        vocab_size=41,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["conv", "full_attention"],
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = Lfm2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # of the size of trained ones
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return str(folder)
