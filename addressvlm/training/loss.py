"""The training loss: cross-entropy on the answer tokens only (paper 001, eq. 2)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from addressvlm.training.collator import IGNORE_INDEX


def answer_loss(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the cross-entropy over a batch's answer tokens, and their number; both scalars."""
    losses = token_losses(model, batch)
    return losses.sum(), torch.tensor(len(losses))


def answer_weights(labels: torch.Tensor, loss: str) -> torch.Tensor:
    """A weight for each answer token of labels (B, T), in the order of `token_losses`.

    With the loss `token` all weigh 1; with `round` the tokens of an answer together do, however long it is.
    """
    answered = labels[:, 1:] != IGNORE_INDEX
    if loss == "token":
        return torch.ones(int(answered.sum()))
    first = answered & ~F.pad(answered, (1, -1))
    number = first.flatten().cumsum(0)[answered.flatten()] - 1
    return 1 / number.bincount()[number].float()


def token_losses(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of every answer token of a batch, (tokens,), in the order of `batch["labels"]`.

    Logits are computed only at the positions that predict an answer token: with a vocabulary of 50k they are the largest
    tensor. Labels on the CPU beside inputs on a GPU spare it a synchronization.
    """
    labels = batch["labels"][:, 1:]
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "kinds")}
    device = inputs["input_ids"].device
    rows, columns = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
    with logits_only_at(model, rows.to(device, non_blocking=True), columns.to(device, non_blocking=True)):
        logits = model(**inputs, use_cache=False).logits.float()
    return F.cross_entropy(logits, labels[rows, columns].to(device, non_blocking=True), reduction="none")


@contextmanager
def logits_only_at(model: Any, rows: torch.Tensor, columns: torch.Tensor) -> Iterator[None]:
    """Within it the model computes logits only of the tokens (row, column) of a batch, (tokens, vocabulary)."""
    while hasattr(model, "module"):  # DistributedDataParallel or DeepSpeed
        model = model.module
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, args: (args[0][rows, columns],))
    try:
        yield
    finally:
        hook.remove()
