"""Activation checkpointing: each layer keeps only its input and is computed again in the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from peft import PeftModel
from torch.utils.flop_counter import FlopCounterMode

from addressvlm.errors import InputError

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


def checkpoint_activations(model: PeftModel, enabled: bool, contexts: Contexts | None = None) -> None:
    """Switch activation checkpointing of all layers on or off.

    Args:
        contexts: makes the contexts in which a layer is computed first and again.

    Raises:
        InputError: the model's family does not support it.
    """
    base: Any = model.get_base_model()
    if not enabled:
        if base.is_gradient_checkpointing:
            base.gradient_checkpointing_disable()
        return
    options = {"use_reentrant": False} | ({"context_fn": contexts} if contexts else {})
    try:
        base.gradient_checkpointing_enable(options)
    except ValueError as error:
        raise InputError(
            f"train.checkpoint_activations does not work with {type(base).__name__} ({str(error)[:120]}): set it to false."
        ) from error


@contextmanager
def useful_flops(model: PeftModel) -> Iterator[Callable[[], int]]:
    """Count operations within the block; the function that it gives returns their number without recomputed ones."""
    recomputed: list[int] = []

    @contextmanager
    def count_recomputed() -> Iterator[None]:
        counter = FlopCounterMode(display=False)
        try:
            with counter:
                yield
        finally:  # recomputing a layer ends early, by an exception
            recomputed.append(counter.get_total_flops())

    base: Any = model.get_base_model()
    enabled = bool(base.is_gradient_checkpointing)
    if enabled:
        checkpoint_activations(model, True, lambda: (nullcontext(), count_recomputed()))
    try:
        with FlopCounterMode(display=False) as counter:
            yield lambda: counter.get_total_flops() - sum(recomputed)
    finally:
        checkpoint_activations(model, enabled)
