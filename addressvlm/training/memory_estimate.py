"""What a training will take, before it is begun: parameters, tokens, memory, operations, time. Needs no GPU and no weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.modeling_layers import GradientCheckpointingLayer

from addressvlm.config import Config
from addressvlm.config.train import Part, StageConfig, SystemConfig
from addressvlm.errors import InputError
from addressvlm.models.loading import context_length, local
from addressvlm.models.lora import attach_lora, set_trainable_parts
from addressvlm.models.parts import part_of
from addressvlm.questions import templates
from addressvlm.training.activation_checkpointing import checkpoint_activations
from addressvlm.training.collator import IGNORE_INDEX, Collator, EncodedSample, Sample, SkipSampleError, sample_from_row
from addressvlm.training.dataset import RowSource, count_steps
from addressvlm.training.stages import remaining_steps, training_rows
from addressvlm.training.strategy import SHARDS_WEIGHTS

NAME = "addressvlm_outline"
PASSES = 3  # operations of both passes through an attention, in those of its forward pass


@dataclass
class Cost:
    """Of one row: floating-point operations, bytes kept, and pairs of tokens over all heads and layers.

    `guessed` if not all of it could be counted.
    """

    flops: float = 0.0
    kept: float = 0.0
    pairs: float = 0.0
    guessed: bool = False

    def __add__(self, other: "Cost") -> "Cost":
        guessed = self.guessed or other.guessed
        return Cost(self.flops + other.flops, self.kept + other.kept, self.pairs + other.pairs, guessed)


def row_cost(
    model: Any, parts: dict[Part, str], image: dict[str, torch.Tensor], tokens: int, answers: int, recompute: bool = False
) -> Cost:
    """Cost of a row of `tokens` tokens, of which `answers` are learnt; what of the model learns is what requires gradients.

    Args:
        recompute: each layer keeps its input only, beside which all of one layer is there while it is computed again.
    """
    AttentionInterface.register(NAME, _attend)
    base = model.get_base_model()
    text, llm = base.config.get_text_config(), base.get_submodule(parts["llm"])
    whole = _kept(
        model, base.get_submodule(parts["vision"]), lambda: _vision(base, parts, image, recompute), recompute
    ) + _kept(model, llm, lambda: _language(llm, text.hidden_size, tokens, base.dtype), recompute)
    width, vocabulary = text.hidden_size, text.vocab_size
    return whole + Cost(4.0 * answers * width * vocabulary, answers * vocabulary * 4.0 * 3)  # logits, their softmax, gradient


def _kept(model: Any, part: torch.nn.Module, count: Callable[[], Cost], recompute: bool) -> Cost:
    cost = count()
    if not recompute or cost.guessed:
        return cost
    training = model.training
    checkpoint_activations(model.train(), True)
    try:
        least = count().kept
    finally:
        checkpoint_activations(model.train(training), False)
    layers = max(1, sum(isinstance(module, GradientCheckpointingLayer) for module in part.modules()))
    return Cost(cost.flops, least + (cost.kept - least) / layers, cost.pairs / layers)


def _language(llm: Any, width: int, tokens: int, dtype: torch.dtype) -> Cost:
    llm.set_attn_implementation(NAME)
    row = torch.empty(1, tokens, width, device="meta", dtype=dtype, requires_grad=True)
    return _counted(lambda: llm(inputs_embeds=row, use_cache=False).last_hidden_state, llm)


def _vision(base: Any, parts: dict[Part, str], image: dict[str, torch.Tensor], recompute: bool) -> Cost:
    """Of encoder and adapter; guessed where a family's code looks into its tensors (Qwen-VL), which then raise RuntimeError."""
    encoder, adapter = base.get_submodule(parts["vision"]), base.get_submodule(parts["adapter"])
    shown = {key: value.to("meta", base.dtype if value.is_floating_point() else None) for key, value in image.items()}
    try:
        if getattr(encoder.config, "num_attention_heads", None):
            encoder.set_attn_implementation(NAME)
        return _counted(lambda: _features(base.get_image_features(**shown)), encoder, adapter)
    except RuntimeError:
        return _guessed(base, encoder, adapter, image, recompute)


def _features(found: Any) -> torch.Tensor:
    found = getattr(found, "pooler_output", found)
    return found if isinstance(found, torch.Tensor) else torch.cat(list(found))


def _guessed(base: Any, encoder: Any, adapter: Any, image: dict[str, torch.Tensor], recompute: bool) -> Cost:
    """Two operations a weight and patch and pass, and sixteen kept numbers a channel, layer and patch, or one."""
    config = encoder.config
    patch, width = getattr(config, "patch_size", 16), config.hidden_size
    depth = getattr(config, "num_hidden_layers", 0) or getattr(config, "depth", 12)
    patches = image["pixel_values"].numel() / (3 * patch**2)
    weights = sum(p.numel() for p in [*encoder.parameters(), *adapter.parameters()])
    passes = 3 if any(p.requires_grad for p in [*encoder.parameters(), *adapter.parameters()]) else 1
    kept = (depth + 16.0 if recompute else 16.0 * depth) * patches * width * base.dtype.itemsize * (passes > 1)
    return Cost(2.0 * passes * weights * patches, kept, guessed=True)


def _counted(forward: Callable[[], torch.Tensor], *modules: torch.nn.Module) -> Cost:
    """Cost of both passes; the second one only if something can learn by it."""
    kept: dict[int, torch.Tensor] = {}
    cost = Cost()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    _totals.append(cost)
    try:
        with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
            out = forward()
            if out.requires_grad:
                out.sum().backward()
    finally:
        _totals.pop()
    cost.flops += counter.get_total_flops()
    owned = {p.untyped_storage()._cdata for module in modules for p in module.parameters()}
    cost.kept += sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in owned)
    for module in modules:
        for parameter in module.parameters():
            parameter.grad = None
    return cost


_totals: list[Cost] = []  # the cost being counted, to which attention adds its part


class _Attention(torch.autograd.Function):
    """Keeps what flash attention keeps and has a result of the right shape."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, None]:
    batch, heads, tokens, width = query.shape
    pairs = batch * heads * tokens * key.shape[2] * (0.5 if getattr(module, "is_causal", False) else 1.0)
    _totals[-1].flops += 4 * pairs * width * (PASSES if query.requires_grad else 1)
    _totals[-1].pairs += batch * heads * tokens * key.shape[2] * query.requires_grad
    return _Attention.apply(query, key, value).transpose(1, 2), None


LOOKED_AT = 64  # rows of a table whose tokens are counted
GIB = 2**30
ZERO3_LIVE = 1e9  # DeepSpeed's default
SPARE = 1.05  # fragmentation, buffers of the libraries


@dataclass
class StageEstimate:
    """One stage on one worker; bytes, operations and steps."""

    name: str
    trained: dict[Part, int]
    rows: int | None  # of an epoch, None if the data is not there yet
    steps: int | None
    tokens: float  # of a mean row
    longest: int
    rows_per_step: int  # of all workers
    flops: float  # of a mean row, both passes
    weights: float
    gradients: float
    optimizer: float
    activations: float  # of one batch
    guessed: bool  # operations and activations of the encoder, by its number of weights

    @property
    def memory(self) -> float:
        """Bytes that a worker needs."""
        return SPARE * (self.weights + self.gradients + self.optimizer + self.activations)

    def seconds(self, peak: float, workers: int, mfu: float) -> float | None:
        """At a share `mfu` of the workers' peak operations a second."""
        return None if self.steps is None else self.steps * self.rows_per_step * self.flops / (mfu * peak * workers)


@dataclass
class ModelShape:
    """A base model without weights, with its adapter and its processor."""

    model: Any
    parts: dict[Part, str]
    processor: Any
    totals: dict[Part, int]  # parameters of each part of the base


def model_shape(config: Config) -> ModelShape:
    """Read the base model's config.json and processor files, and nothing of its weights.

    Raises:
        InputError: they are not in the folder, or not at hand offline.
    """
    where = local(config.model.base)
    options = {"trust_remote_code": config.model.trust_remote_code}
    try:
        described = AutoConfig.from_pretrained(where, **options)
        processor = AutoProcessor.from_pretrained(where, backend="pil", **options)
        with torch.device("meta"):
            base = AutoModelForImageTextToText.from_config(described, dtype=getattr(torch, config.model.dtype), **options)
            model, parts = attach_lora(base, config.model)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise InputError(
            f"a plan for '{config.model.base}' needs its config.json and processor files, not its weights "
            f"({' '.join(str(error).split())[:200]}): fetch those, or unset HF_HUB_OFFLINE."
        ) from error
    totals: dict[Part, int] = dict.fromkeys(parts, 0)
    for name, weights in model.get_base_model().named_parameters():
        if "lora_" not in name and ".modules_to_save." not in name:
            totals[part_of(name, parts) or "llm"] += weights.numel()  # the head, wherever it is, is the language model's
    return ModelShape(model, parts, processor, totals)


def estimate_stages(
    config: Config, system: SystemConfig, base: ModelShape, photos: int | None = None, cpu: bool = False
) -> list[StageEstimate]:
    """The stages of a system.

    Args:
        photos: rows of a table that is not there yet.
        cpu: activations as on a CPU, where plain attention keeps a number for each pair of tokens.
    """
    stages = [_stage(config, name, base, photos, cpu) for name in system.stages]
    if system.match_steps_of and stages:
        model = next(s for s in config.train.systems if s.name == system.match_steps_of)
        whole = [_steps(config, name, _table(config, name), photos) for name in model.stages]
        before = [stage.steps for stage in stages[:-1]]
        known = [steps for steps in (*whole, *before) if steps is not None]
        complete = len(known) == len(whole) + len(before)
        stages[-1].steps = remaining_steps(system, sum(known[: len(whole)]), sum(known[len(whole) :])) if complete else None
    return stages


def _table(config: Config, stage: str) -> RowSource | None:
    try:
        return training_rows(config, config.train.stages[stage].tables, config.train.stages[stage].locatability)
    except InputError:
        return None


def _count(config: Config, stage: str, table: RowSource | None, photos: int | None) -> int | None:
    """Rows of an epoch, None if nobody knows."""
    return len(table) if table is not None else photos and photos * len(config.train.stages[stage].tables)


def _per_step(config: Config, stage: str) -> int:
    made = config.train.stages[stage]
    return made.batch_size * made.gradient_accumulation_steps * config.train.workers


def _steps(config: Config, name: str, table: RowSource | None, photos: int | None) -> int | None:
    stage, count = config.train.stages[name], _count(config, name, table, photos)
    return count_steps(count, _per_step(config, name), stage.epochs, stage.max_steps) if count else stage.max_steps


def _stage(config: Config, name: str, base: ModelShape, photos: int | None, cpu: bool) -> StageEstimate:
    stage, world = config.train.stages[name], config.train.workers
    table = _table(config, name)
    found = _rows(config, stage, base, table)
    mean = sum(len(row.ids) for row in found) / len(found)
    longest = max(found, key=lambda row: len(row.ids))
    answers = sum(label != IGNORE_INDEX for row in found for label in row.labels) / len(found)
    set_trainable_parts(base.model, base.parts, stage.parts)
    twice = config.train.checkpoint_activations
    cost = row_cost(base.model, base.parts, longest.image, len(longest.ids), round(answers), twice)
    trained: dict[Part, int] = dict.fromkeys(base.parts, 0)
    adapter = 0
    for path, parameter in base.model.named_parameters():
        if parameter.requires_grad:
            trained[part_of(path, base.parts) or "llm"] += parameter.numel()
            adapter += parameter.numel()
    shared = world if config.train.strategy != "ddp" else 1  # gradients and optimizer state are cut among workers
    return StageEstimate(
        name,
        trained,
        _count(config, name, table, photos),
        _steps(config, name, table, photos),
        mean,
        len(longest.ids),
        _per_step(config, name),
        cost.flops * mean / len(longest.ids),
        _weights(base.model, config.train.strategy, world),
        4.0 * adapter / shared,
        8.0 * adapter / shared,
        stage.batch_size * kept_bytes(cost, config, cpu),
        cost.guessed,
    )


def _weights(model: Any, strategy: str, world: int) -> float:
    """Bytes of weights of a worker: its share where they are cut, and what is put together for computing."""
    whole = _bytes(model)
    if strategy not in SHARDS_WEIGHTS or world == 1:
        return whole
    layers = sorted(_bytes(module) for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    # FSDP2 keeps what is in no layer whole during a step, and fetches the next layer while it computes one; DeepSpeed keeps
    # up to `stage3_max_live_parameters`.
    if strategy == "fsdp2":
        return whole / world + whole - sum(layers[:-2])
    return whole / world + min(whole, ZERO3_LIVE * whole / _numbers(model))


def _bytes(module: torch.nn.Module) -> float:
    return float(sum(weights.numel() * weights.itemsize for weights in module.parameters()))


def _numbers(module: torch.nn.Module) -> int:
    return sum(weights.numel() for weights in module.parameters())


def kept_bytes(cost: Cost, config: Config, cpu: bool) -> float:
    """Activations of a row."""
    size = 4 if config.model.dtype == "float32" else 2
    return cost.kept + (cost.pairs * size if cpu else 0.0)


def _rows(config: Config, stage: StageConfig, base: ModelShape, table: RowSource | None) -> list[EncodedSample]:
    """Encoded rows of the table, or a made-up one where it is not there yet."""
    collate = Collator(base.processor, stage.isolate_questions, context=context_length(base.model.get_base_model()))
    samples: Sequence[Sample]
    if table is None:
        side = config.tiles.pixels
        asked = templates("street", "choice")[0].format(options="; ".join(["Forbes Avenue"] * 4))
        rounds = config.city.rounds if "photos" in stage.tables else 1
        answer = "Forbes Avenue, Oakland" if "photos" in stage.tables else "Forbes Avenue runs there. " * 12
        image = Image.new("RGB", (side, side))
        tile = image if config.tiles.layout == "two" and "alignment" in stage.tables else None
        return [collate.encode(Sample(image, [(asked, answer)] * rounds, tile=tile))]
    last = int(table.starts[-1])
    found = []
    for index in range(0, last, max(1, last // LOOKED_AT)):
        try:
            samples = [sample_from_row(table[index])]
            found.append(collate.encode(samples[0]))
        except SkipSampleError:
            continue
    if not found:
        raise InputError("none of the training rows looked at can be used: look at the photos and prepare the data again.")
    return found
