"""Models, objectives and datasets that are wrong on purpose, each in one way, for `verify` to find out."""

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbgd import InMemory, PerExample
from mbgd.data import digits


def _clamped(gradient: Tensor) -> Tensor:
    return gradient.clamp(-0.01, 0.01)


class Net(nn.Module):
    """64 → 16 → 10, with what is wrong in between."""

    def __init__(self, wrong: str = "") -> None:
        super().__init__()
        self.wrong = wrong
        self.first, self.last = nn.Linear(64, 16), nn.Linear(16, 10)
        self.norm = nn.BatchNorm1d(16) if wrong == "batch_norm" else nn.Identity()
        self.dropout = nn.Dropout(0.2) if wrong == "dropout" else nn.Identity()
        self.generator = torch.Generator().manual_seed(0)
        if wrong == "hook":
            self.first.weight.register_hook(_clamped)  # type: ignore[no-untyped-call]
        if wrong == "unused":
            self.spare = nn.Linear(3, 3)
        if wrong == "kink":
            self.branch = nn.Linear(16, 16)
            nn.init.zeros_(self.branch.weight)
            nn.init.zeros_(self.branch.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.first(inputs.flatten(1))))
        if self.wrong == "detached":
            hidden = hidden.detach()
        if self.wrong == "partly_detached":
            hidden = hidden + hidden.detach() ** 2
        if self.wrong == "kink":  # half of what the second ReLU gets is exactly 0
            hidden = torch.relu(torch.relu(hidden) + self.branch(hidden))
        if self.wrong == "rank_seeded":
            seeded = torch.Generator().manual_seed(int(os.environ.get("RANK", "0")))
            hidden = hidden * (torch.rand(hidden.shape, generator=seeded, dtype=torch.float64) < 0.8).to(hidden)
        if self.wrong == "own_generator":
            hidden = hidden * (torch.rand(hidden.shape, generator=self.generator) < 0.8).to(hidden)
        if self.wrong == "changes_parameters":
            with torch.no_grad():
                self.last.weight.mul_(0.999)
        output: Tensor = self.last(self.dropout(hidden))
        return output


def hidden_mean(model: nn.Module, batch: Any) -> PerExample:
    inputs, targets = batch
    losses = F.cross_entropy(model(inputs), targets, reduction="none")
    return PerExample(losses.mean().expand(len(losses)))


def divided(model: nn.Module, batch: Any) -> PerExample:
    inputs, targets = batch
    losses = F.cross_entropy(model(inputs), targets, reduction="none")
    return PerExample(losses / len(losses))


def contrastive(model: nn.Module, batch: Any) -> PerExample:
    """Each example against all others of its batch."""
    inputs, _ = batch
    codes = F.normalize(model(inputs), dim=1)
    shifted = F.normalize(model(inputs.roll(1, -1)), dim=1)
    return PerExample(F.cross_entropy(codes @ shifted.T / 0.5, torch.arange(len(codes)), reduction="none"))


class OfWorker(InMemory):
    """Digits whose examples from the hundredth on depend on the worker; the first, which are compared, do not."""

    def __init__(self) -> None:
        whole = digits("train")
        super().__init__(whole.inputs, whole.targets)
        self.shift = torch.zeros(len(whole))
        self.shift[100:-100] = 0.1 * int(os.environ.get("RANK", "0"))

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        inputs, targets = super().gather(indices)
        return inputs + self.shift[indices].view(-1, 1, 1, 1), targets


class Ragged:
    """Token sequences whose labels count in part: every example has another number of them."""

    def __init__(self, num_examples: int = 64, length: int = 12, vocabulary: int = 40) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(vocabulary, (num_examples, length), generator=generator)
        self.counts = torch.randint(1, length, (num_examples,), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.tokens[index]
        kept = torch.arange(len(tokens)) < self.counts[index]
        return {"input_ids": tokens, "labels": tokens.masked_fill(~kept, -100)}


def gpt2() -> nn.Module:
    """A GPT-2 of transformers with tied embeddings, made from a configuration."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 40, "n_positions": 12}
    ends = {"bos_token_id": 0, "eos_token_id": 0}  # inside the vocabulary; the defaults are GPT-2's own
    model: nn.Module = GPT2LMHeadModel(GPT2Config(**sizes, **ends, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    return model


def next_token(model: nn.Module, batch: Any) -> PerExample:
    logits, labels = model(batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return PerExample(losses, (labels != -100).to(losses.dtype))


class Contrastive:
    """`contrastive` as a pair."""

    def __init__(self, wrong: str = "") -> None:
        self.wrong = wrong

    def encode(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        inputs, _ = batch
        codes, shifted = F.normalize(model(inputs), dim=1), F.normalize(model(inputs.roll(1, -1)), dim=1)
        if self.wrong == "coupled":
            codes = codes - codes.mean(0)
        return codes, shifted

    def losses(self, *encodings: Tensor) -> PerExample:
        codes, shifted = encodings
        return PerExample(F.cross_entropy(codes @ shifted.T / 0.5, torch.arange(len(codes)), reduction="none"))
