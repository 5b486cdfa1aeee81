"""Activation checkpointing: of each layer only its input is kept for the backward pass, which computes the rest once more."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from peft import PeftModel
from torch.utils.flop_counter import FlopCounterMode

from addressvlm.errors import InputError

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


def checkpoint_activations(model: PeftModel, wanted: bool, contexts: Contexts | None = None) -> None:
    """Switch it on or off for all layers.

    Args:
        contexts: of the first and the second computation of a layer.

    Raises:
        InputError: the model's family has none that can be computed twice.
    """
    base: Any = model.get_base_model()
    if not wanted:
        if base.is_gradient_checkpointing:
            base.gradient_checkpointing_disable()
        return
    options = {"use_reentrant": False} | ({"context_fn": contexts} if contexts else {})
    try:
        base.gradient_checkpointing_enable(options)
    except ValueError as error:
        raise InputError(
            f"train.checkpoint_activations does not go with {type(base).__name__} ({str(error)[:120]}): set it to false."
        ) from error


@contextmanager
def useful_flops(model: PeftModel) -> Iterator[Callable[[], int]]:
    """Within it operations are counted; what is given tells their number less those made a second time to save memory."""
    again: list[int] = []

    @contextmanager
    def second() -> Iterator[None]:
        counter = FlopCounterMode(display=False)
        try:
            with counter:
                yield
        finally:  # the second computation of a layer ends early, by an exception
            again.append(counter.get_total_flops())

    base: Any = model.get_base_model()
    on = bool(base.is_gradient_checkpointing)
    if on:
        checkpoint_activations(model, True, lambda: (nullcontext(), second()))
    try:
        with FlopCounterMode(display=False) as counter:
            yield lambda: counter.get_total_flops() - sum(again)
    finally:
        checkpoint_activations(model, on)
