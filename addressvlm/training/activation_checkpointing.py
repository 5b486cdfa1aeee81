"""Activation checkpointing: each layer keeps only its input and is computed again in the backward pass.

And the probe of one row before a stage: which parameters get no gradient, and how many operations a row costs.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from peft import PeftModel
from torch.utils.flop_counter import FlopCounterMode

from addressvlm.config.train import Part
from addressvlm.errors import InputError
from addressvlm.models.families import part_of
from addressvlm.models.lora import trainable_params
from addressvlm.training.collator import Collator
from addressvlm.training.loss import answer_loss

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


def probe_first_row(model: PeftModel, parts: dict[Part, str], collator: Collator, stage: Any) -> int:
    """Freeze parameters without a gradient (LLaVA skips the vision encoder's last layer); DDP would wait for theirs.

    Returns:
        Floating-point operations of forward and backward pass of one row: matrix products and convolutions, two for each
        multiply-add. What activation checkpointing recomputes is not counted.

    Raises:
        InputError: a chosen part gets no gradient, no row can be used, or the processor writes another number of image tokens
            than the model has features.
    """
    schedule = stage.schedule
    batch = collator.batch(schedule.encoded(collator, 0, 0, schedule.per_step))  # one row
    device = next(model.parameters()).device
    with useful_flops(model) as flops:
        try:
            loss, _ = answer_loss(model, collator.finish({k: v.to(device) for k, v in batch.items()}))
        except ValueError as error:
            message = " ".join(str(error).split())
            if "image" not in message.lower() or "token" not in message.lower():
                raise
            raise InputError(
                f"{stage.name}: the base model and its processor disagree on the number of image tokens ({message[:160]}): "
                "check patch_size, vision_feature_select_strategy and num_additional_image_tokens in processor_config.json."
            ) from error
        loss.backward()
    used: set[Part | None] = set()
    for name, parameter in trainable_params(model).items():
        if parameter.grad is None:
            parameter.requires_grad = False
        else:
            used.add(part_of(name, parts))
        parameter.grad = None
    for part in stage.config.parts:
        if part not in used:
            raise InputError(
                f"{stage.name}: no gradient reaches the {part} part: remove it from train.stages.{stage.name}.parts, or "
                "check addressvlm/models/families.py for this model."
            )
    return flops()
