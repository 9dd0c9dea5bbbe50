"""A GPT-2 of Hugging Face's transformers learns to add: texts of several lengths, loss on the answers alone.

    torchrun --standalone --nproc-per-node 2 examples/gpt2_sums.py

`python examples/gpt2_sums.py` is one worker; with --plain it is the loop of plain torch below.
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel

import mbgd

CHARACTERS = "0123456789+=."
PADDING, IGNORED = 0, -100
NUM_EVALUATED = 200


class Sums(Dataset[dict[str, Tensor]]):
    """Example i is a text such as "7+85=92." whose labels are its answer; the rest is IGNORED."""

    def __init__(self, first: int, num_examples: int) -> None:
        self.first, self.num_examples = first, num_examples

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number = (self.first + index) * 7919 % 10_000  # in no order
        one, other = divmod(number, 100)
        question, answer = f"{one}+{other}=", f"{one + other}."
        ids = torch.tensor([CHARACTERS.index(character) for character in question + answer])
        labels = ids.clone()
        labels[: len(question)] = IGNORED
        return {"ids": ids, "labels": labels}


def padded(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One batch: padded ids, their mask, and labels that are IGNORED on padding."""
    ids, labels = ([one[name] for one in examples] for name in ("ids", "labels"))
    pad = nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(one) for one in ids], batch_first=True)
    return {"ids": pad(ids, True, PADDING), "mask": mask, "labels": pad(labels, True, IGNORED)}


def model() -> GPT2LMHeadModel:
    """Its output layer is tied to its embeddings. No dropout, so that the loop below gives the same numbers."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(CHARACTERS), "n_positions": 16, "n_embd": 64, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(
        GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0)
    )


def next_characters(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (N, T, C) of the next characters, and labels (N, T)."""
    logits = model(input_ids=batch["ids"], attention_mask=batch["mask"]).logits
    return logits[:, :-1], batch["labels"][:, 1:]


def objective(model: nn.Module, batch: dict[str, Tensor]) -> mbgd.PerExample:
    """One loss per character; characters that are IGNORED have weight 0."""
    logits, labels = next_characters(model, batch)
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    weights = (labels != IGNORED).to(losses.dtype)
    return mbgd.PerExample(losses, weights, {"accuracy": logits.argmax(-1) == labels})


def train(workers: mbgd.Workers, *, steps: int = 600, **settings: Any) -> dict[str, float]:
    """The metrics after training with mbgd."""
    gpt = model()
    data = mbgd.Data(
        train=Sums(NUM_EVALUATED, 10_000 - NUM_EVALUATED),
        evaluation=Sums(0, NUM_EVALUATED),
        shuffle=False,  # the texts are in no order, and every step has new ones
        collate=padded,
    )
    trainer = mbgd.Trainer(
        gpt,
        objective,
        torch.optim.AdamW(gpt.parameters(), lr=3e-3),
        data,
        mbgd.Settings(steps=steps, batch=mbgd.Batch(size=64), **settings),
        workers,
    )
    return trainer.fit().metrics


def plain_torch(*, steps: int = 600, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """The same on one process without mbgd."""
    gpt = model().to(dtype)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=3e-3)
    loader = DataLoader(Sums(NUM_EVALUATED, 10_000 - NUM_EVALUATED), batch_size=64, collate_fn=padded)
    step = 0
    while step < steps:
        for batch in loader:
            logits, labels = next_characters(gpt, batch)
            loss = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step == steps:
                break
    gpt.eval()
    with torch.no_grad():
        (batch,) = DataLoader(Sums(0, NUM_EVALUATED), batch_size=NUM_EVALUATED, collate_fn=padded)
        logits, labels = next_characters(gpt, batch)
        return {"eval/loss": F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED).item()}


def main() -> None:
    if "--plain" in sys.argv:
        print(plain_torch())
        return
    with mbgd.start_workers() as workers:
        metrics = train(workers)
    if workers.is_main:
        print(f"loss {metrics['eval/loss']:.4f}, {metrics['eval/accuracy']:.1%} of the answers' characters")


if __name__ == "__main__":
    main()
