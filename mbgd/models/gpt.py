"""A transformer that predicts the next token (Radford et al. 2019), of any size."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mbgd.errors import UsageError

INITIAL_STD = 0.02


class GPT(nn.Module):
    """Token ids (N, T) → logits (N, T, num_outputs), causal; T ≤ context.

    Learned position embeddings, pre-LayerNorm blocks, GELU, no biases, tied token embedding and output matrix.
    Initialised like GPT-2: normal with standard deviation 0.02, and 0.02 / sqrt(2 num_layers) for the projections
    added to the residual stream.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_outputs: int,
        *,
        num_layers: int = 4,
        num_heads: int = 4,
        width: int = 128,
        dropout: float = 0.0,
    ) -> None:
        """input_shape: (context,), the longest sequence; num_outputs: the number of different tokens."""
        super().__init__()
        if len(input_shape) != 1:
            raise UsageError(
                f"input_shape={tuple(input_shape)}; the gpt takes sequences of token ids, of shape (context,), which "
                "data=text and data=tokens give."
            )
        if num_heads < 1 or width % num_heads:
            raise UsageError(f"model.width={width} with model.num_heads={num_heads}; each head takes an equal share.")
        self.vocabulary = num_outputs
        self.tokens = nn.Embedding(num_outputs, width)
        self.positions = nn.Embedding(input_shape[0], width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                adds_to_stream = name.endswith("output.weight")
                nn.init.normal_(parameter, std=INITIAL_STD / (math.sqrt(2 * num_layers) if adds_to_stream else 1))

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.is_floating_point():
            raise UsageError(f"the gpt got inputs of dtype {tokens.dtype}; it takes token ids, which are integers.")
        if tokens.shape[1] > self.positions.num_embeddings:
            raise UsageError(
                f"the gpt got sequences of {tokens.shape[1]} tokens, but it has a context of "
                f"{self.positions.num_embeddings}. Set data.context to that, or model.input_shape to null to take it "
                "from the data."
            )
        positions = self.positions.weight[: tokens.shape[1]]
        stream = self.dropout(self.tokens(tokens) + positions)
        for block in self.blocks:
            stream = block(stream)
        return F.linear(self.norm(stream), self.tokens.weight)


class Block(nn.Module):
    """Attention and a multilayer perceptron, each added to the residual stream (N, T, width)."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.attention = Attention(width, num_heads, dropout)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.mlp = MLP(width, dropout)

    def forward(self, stream: Tensor) -> Tensor:
        stream = stream + self.attention(self.attention_norm(stream))
        outputs: Tensor = stream + self.mlp(self.mlp_norm(stream))
        return outputs


class Attention(nn.Module):
    """Causal self-attention (Vaswani et al. 2017)."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        heads = self.queries_keys_values(inputs).unflatten(-1, (3, self.num_heads, -1))
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)  # each (N, heads, T, width / heads)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, is_causal=True)
        outputs = self.output(mixed.transpose(1, 2).flatten(2))
        return F.dropout(outputs, self.dropout, self.training)


class MLP(nn.Module):
    """One hidden layer, four times as wide."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, 4 * width, bias=False)
        self.output = nn.Linear(4 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.dropout(self.output(F.gelu(self.hidden(inputs))))
        return outputs
