r"""A model's shapes, made on the meta device: no weights and no tokenizer are loaded.

Korthikanti et al. 2022 (arXiv:2205.05198, sec. 4.1) count the activations that a GPT layer saves. Of a Llama
layer, with RMS norms in float32, repeated key-value heads, a gated MLP, and an attention kernel that saves no
probabilities, autograd keeps for each token

.. math:: 4 (2 D + 2 + H) + 2 r D + c\,((2 \text{ or } 5) D + 4 A + 4 I + S)

bytes: the norms' inputs, their inverse scales and the attention's log-sums in float32; normalized states; the
inputs of the products (2, or 5 where autocast casts for each product, r != c); query, repeated key and value,
output; gate, its activation, up, product; and the padding mask, which SDPA turns into a bias anew in every
layer. Packed sequences have no mask and repeat nothing, but their outputs are joined: 3 A + 2 K for 4 A + S.

D is the hidden and I the intermediate width, H the query heads, A = H x head size, K = key-value heads x head
size, S the tokens of a row, padding included; c and r are bytes of a number in matrix products and in the
residual stream: autocast leaves the embedding's output in the weights' dtype, FSDP casts the weights, and
r = c. tests/unit/test_plan.py compares with what autograd keeps, byte by byte.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rlvr.errors import ConfigError
from rlvr.policy import TINY


@dataclass(frozen=True)
class Shapes:
    """Of a causal language model with gated MLPs, RMS norms and grouped-query attention.

    Args:
        parameters: of all, tied ones once.
        layer_parameters: of one layer.
        layers: how many.
        hidden: width of the residual stream.
        intermediate: width of the MLP.
        heads: of queries.
        kv_heads: of keys and values.
        head_dim: of each.
        vocabulary: rows of the embedding.
        tied: whether the head is the embedding.
    """

    parameters: int
    layer_parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @property
    def head(self) -> int:
        """Parameters of the head."""
        return self.vocabulary * self.hidden

    @property
    def root(self) -> int:
        """Parameters outside the layers: embedding, last norm, head."""
        return self.parameters - self.layers * self.layer_parameters

    def saved_bytes(self, *, computed: int, residual: int, padded: int | None) -> int:
        """What autograd keeps of one layer for one token: see the module's docstring.

        Args:
            computed: bytes of a number in matrix products.
            residual: of one in the residual stream.
            padded: tokens of a row; None for packed sequences.
        """
        inputs = 2 if residual == computed else 5
        floats = 2 * self.hidden + 2 + self.heads
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 3 * query + 2 * key if padded is None else 4 * query + padded
        products = inputs * self.hidden + attention + 4 * self.intermediate
        return max(4, residual) * floats + 2 * residual * self.hidden + computed * products

    def kv_bytes(self, size: int) -> int:
        """Of the cache for one token, all layers, ``size`` bytes a number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * size

    def forward_flops(self, tokens: int, length: float) -> float:
        """Of the layers for ``tokens`` that attend to ``length`` tokens each."""
        attention = 4 * self.layers * self.heads * self.head_dim * length
        return tokens * (2.0 * self.layers * self.layer_parameters + attention)


def shapes_of(path: str | None) -> Shapes:
    """Read a model's configuration and count its parameters on the meta device; no weights, no tokenizer.

    Args:
        path: as ``policy.path``: hub id, folder or ``.gguf`` file; None: the embedded policy.

    Raises:
        ConfigError: where there is no such configuration, or it is no Llama-like model's.
    """
    source = Path(TINY if path is None else path)
    local = path is None or path.startswith((".", "/", "~")) or source.suffix == ".gguf"
    fix = "policy.path=<hub id, folder with a config.json, or .gguf file>"
    if local and not source.expanduser().exists():
        raise ConfigError(f"policy.path={path}", "an existing folder or file", fix)
    gguf = {"gguf_file": source.name} if source.suffix == ".gguf" else {}
    place = str(source.parent) if gguf else str(TINY if path is None else path)
    model: Any
    try:
        config = AutoConfig.from_pretrained(place, **gguf)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"policy.path={path}", f"a model's configuration ({reason})", fix) from error
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    text = config.get_text_config()
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    if not layers or any(getattr(text, name, None) is None for name in sizes):
        raise ConfigError(f"policy.path={path}", f"a Llama-like model: layers, {', '.join(sizes)}", fix)
    return Shapes(
        parameters=_count(model),
        layer_parameters=_count(layers[0]),
        layers=len(layers),
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocabulary=text.vocab_size,
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
