"""One row through the model before a stage begins: what the loss doesn't reach, and what a row costs."""

from typing import Any

from peft import PeftModel

from addressvlm.config.train import Part
from addressvlm.errors import InputError
from addressvlm.models.lora import trainable_params
from addressvlm.models.parts import part_of
from addressvlm.training.activation_checkpointing import useful_flops
from addressvlm.training.collator import Collator
from addressvlm.training.loss import answer_loss


def probe_first_row(model: PeftModel, parts: dict[Part, str], collate: Collator, stage: Any) -> int:
    """Freeze weights that the loss doesn't reach (LLaVA skips the vision encoder's last layer), or DDP waits for them.

    Returns:
        Floating-point operations of forward and backward pass of one row: its matrix products and convolutions, two for each
        multiplication and addition. It is the work that is useful, whatever is computed twice to save memory.

    Raises:
        InputError: nothing of a chosen part is reached, no row can be used, or the processor writes another number of
            image tokens than the model has features.
    """
    schedule = stage.schedule
    batch = collate.batch(schedule.encoded(collate, 0, 0, schedule.per_step))  # one row, as if each had a worker of its own
    device = next(model.parameters()).device
    with useful_flops(model) as flops:
        try:
            loss, _ = answer_loss(model, {k: v.to(device) for k, v in batch.items()})
        except ValueError as error:
            raise _mismatch(error, stage.name) or error from error
        loss.backward()
    reached: set[Part | None] = set()
    for name, parameter in trainable_params(model).items():
        if parameter.grad is None:
            parameter.requires_grad = False
        else:
            reached.add(part_of(name, parts))
        parameter.grad = None
    for part in stage.config.parts:
        if part not in reached:
            raise InputError(
                f"{stage.name}: no gradient reaches the {part} part: take it out of train.stages.{stage.name}.parts, or "
                "check addressvlm/models/parts.py for this model."
            )
    return flops()


def _mismatch(error: ValueError, stage: str) -> InputError | None:
    """The sentence for a processor that doesn't fit its model."""
    sentence = " ".join(str(error).split())
    if "image" not in sentence.lower() or "token" not in sentence.lower():
        return None
    return InputError(
        f"{stage}: the base model and its processor disagree on the number of image tokens ({sentence[:160]}): check "
        "patch_size, vision_feature_select_strategy and num_additional_image_tokens in processor_config.json."
    )
