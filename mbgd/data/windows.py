"""Windows of a stream of tokens: the examples of a language model."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mbgd.errors import UsageError


class TokenWindows:
    """Next-token prediction: example i is one window of one document, (inputs, targets) of shape (context,), int64.

    Document d runs from its first token at `boundaries[d]` to its last at `boundaries[d + 1]`, which is also the next
    document's first token. Every token of a document but its first is the target in exactly one window,
    predicted from the tokens before it in that window. After a document's end, the rest of its last window's targets
    are `ignore_index`, which gives them weight 0.
    """

    def __init__(
        self,
        tokens: NDArray[np.unsignedinteger[Any]],
        boundaries: NDArray[np.int64],
        *,
        context: int,
        vocabulary: int,
        ignore_index: int = -100,
    ) -> None:
        """tokens: the stream, memory-mapped or not, all ids < vocabulary; boundaries: increasing positions in it."""
        if context < 1:
            raise UsageError(f"data.context={context}; a window has at least 1 token.")
        if 0 <= ignore_index < vocabulary:
            raise UsageError(
                f"data.ignore_index={ignore_index} is a token; it must not be one of 0 to {vocabulary - 1}."
            )
        self.context, self.vocabulary, self.ignore_index = context, vocabulary, ignore_index
        self._tokens, self._boundaries = np.asarray(tokens), boundaries
        num_windows = -(-np.diff(boundaries) // context)
        self._first_windows = np.concatenate([np.zeros(1, np.int64), np.cumsum(num_windows)])

    def __len__(self) -> int:
        return int(self._first_windows[-1])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.gather(torch.tensor([index]))
        return inputs[0], targets[0]

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The examples at these indices (int64, shape (N,)): inputs and targets, int64, shape (N, context)."""
        numbers = indices.numpy()
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"examples {numbers.min()} to {numbers.max()}; there are {len(self)}.")
        documents = np.searchsorted(self._first_windows, numbers, side="right") - 1
        starts = self._boundaries[documents] + (numbers - self._first_windows[documents]) * self.context
        positions = starts[:, None] + np.arange(self.context + 1)
        ends = self._boundaries[documents + 1][:, None]
        windows = self._tokens[np.minimum(positions, ends)]
        inputs, targets = (part.astype(np.int64) for part in (windows[:, :-1], windows[:, 1:]))
        targets[positions[:, 1:] > ends] = self.ignore_index
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example's input."""
        return (self.context,)

    @property
    def num_outputs(self) -> int:
        """The number of classes: the size of the vocabulary."""
        return self.vocabulary
