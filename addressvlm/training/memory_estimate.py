"""Estimate a training's parameters, memory, operations and time from config.json alone: no weights, no GPU, no Ray.

python ray_jobs/train.py --config paper-pitts --dry-run --photos 177840
"""

from collections.abc import Callable
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
from addressvlm.models.families import part_of
from addressvlm.models.loading import autocast, context_length, local
from addressvlm.models.lora import adapter_weights, attach_lora, set_trainable_parts
from addressvlm.questions import templates
from addressvlm.storage.tables import ROWS_PER_GROUP
from addressvlm.training.activation_checkpointing import checkpoint_activations
from addressvlm.training.collator import IGNORE_INDEX, Collator, EncodedSample, Sample, SkipSampleError, sample_from_row
from addressvlm.training.dataset import CACHED_GROUPS, RowSource, count_steps
from addressvlm.training.loader import STEPS_A_PROCESS, loader_processes
from addressvlm.training.metrics_logger import peak_flops, total_memory_gib
from addressvlm.training.stages import remaining_steps, training_rows
from addressvlm.training.strategy import SHARDS_WEIGHTS

ATTENTION = "addressvlm_memory_estimate"
SAMPLED_ROWS = 64  # rows of a table whose tokens are counted
GIB = 2**30
ZERO3_LIVE = 1e9  # DeepSpeed's default of stage3_max_live_parameters
OVERHEAD = 1.05  # fragmentation, the libraries' buffers
LIBRARIES = 0.6 * GIB  # of a process that has imported them
ROW_BYTES = 64 * 1024  # of an encoded photo and its questions, where the table is not there yet
FORMULA = (
    "memory a worker = 1.05 x (weights as stored + adapter in float32 + 4 bytes of gradient and 8 of AdamW for each trained "
    "parameter + activations of one batch); of what train.strategy shards, a worker's share"
)


@dataclass
class RowCost:
    """Cost of one row, forward and backward pass.

    Attributes:
        activations: bytes kept for the backward pass.
        pairs: pairs of tokens over all heads and layers, for which plain attention keeps a number.
        guessed: whether the encoder's share follows from its number of weights, where it could not be counted.
    """

    flops: float = 0.0
    activations: float = 0.0
    pairs: float = 0.0
    guessed: bool = False

    def __add__(self, other: "RowCost") -> "RowCost":
        return RowCost(
            self.flops + other.flops,
            self.activations + other.activations,
            self.pairs + other.pairs,
            self.guessed or other.guessed,
        )


@dataclass
class StageEstimate:
    """One stage on one worker; memory in bytes."""

    name: str
    trained: dict[Part, int]  # trained parameters
    rows: int | None  # of an epoch, None if the table is missing
    steps: int | None
    tokens: float  # of a mean row
    longest: int
    rows_per_step: int  # of all workers
    flops: float  # of a mean row, both passes
    weights: float
    gradients: float
    optimizer: float
    activations: float  # of one batch
    guessed: bool  # see RowCost
    loading: float  # the base's weights, which are loaded into the machine's memory first, and once more to be merged
    ahead: float  # rows read and encoded ahead, by their processes
    kept: float  # copies of adapter and optimizer on their way into a checkpoint

    @property
    def memory(self) -> float:
        return OVERHEAD * (self.weights + self.gradients + self.optimizer + self.activations)

    def host_memory(self, on_cpu: bool) -> float:
        """Memory of a worker's machine; `on_cpu`: training takes it too."""
        return LIBRARIES + self.ahead + max(self.loading, self.kept + (self.memory if on_cpu else 0.0))

    def seconds(self, peak: float, workers: int, mfu: float) -> float | None:
        """Training time at a share `mfu` of the workers' `peak` operations a second."""
        return None if self.steps is None else self.steps * self.rows_per_step * self.flops / (mfu * peak * workers)


@dataclass
class ModelShape:
    """A base model without weights, with its adapter and processor; `totals` are the base's parameters of each part."""

    model: Any
    parts: dict[Part, str]
    processor: Any
    totals: dict[Part, int]


def print_estimate(config: Config, systems: list[SystemConfig], photos: int | None = None) -> None:
    """Print the estimate of every stage of the systems.

    Args:
        photos: number of photos, where the tables are not there yet.

    Raises:
        InputError: the base model's config.json is missing, or a stage needs more memory than a GPU has.
    """
    shape, train = model_shape(config), config.train
    print("parameters: " + ", ".join(f"{part} {count:,}" for part, count in shape.totals.items()), flush=True)
    available = train.gpu_memory_gib or total_memory_gib()
    device = torch.device("cuda" if train.gpus_per_worker and torch.cuda.is_available() else "cpu")
    bfloat16 = autocast(device, getattr(torch, config.model.dtype), train.precision)._enabled
    peak = peak_flops(device, torch.bfloat16 if bfloat16 else torch.float32, train.peak_tflops)
    for system in systems:
        for stage in estimate_stages(config, system, shape, photos, cpu=not train.gpus_per_worker):
            print(
                f"{system.name}: {stage.name}\n" + describe_stage(config, stage, sum(shape.totals.values()), peak), flush=True
            )
            if train.gpus_per_worker and available and stage.memory / GIB > available:
                raise InputError(
                    f"{system.name}, {stage.name} needs about {stage.memory / GIB:.1f} GiB a GPU, which has {available:g}: "
                    f"lower batch_size of train.stages.{stage.name} ({train.stages[stage.name].batch_size}) and raise "
                    "gradient_accumulation_steps by as much, or set model.dtype to bfloat16, train.checkpoint_activations to "
                    "true or train.strategy to fsdp2."
                )
    print(FORMULA, flush=True)


def describe_stage(config: Config, stage: StageEstimate, total: int, peak: float | None) -> str:
    """The lines about a stage; `total` are the base's parameters, `peak` a worker's operations a second if known."""
    train, trained = config.train, ", ".join(f"{part} {count:,}" for part, count in stage.trained.items() if count)
    steps = "unknown (give --photos)" if stage.steps is None else f"{stage.steps:,}"
    lines = [
        f"  trained: {trained} ({100 * sum(stage.trained.values()) / total:.2f} % of the base)",
        f"  a row: {stage.tokens:.0f} tokens (longest {stage.longest:,}), {stage.flops / 1e12:.3f} TFLOP for both passes",
        f"  a step: {stage.rows_per_step:,} rows, {stage.rows_per_step * stage.tokens:,.0f} tokens; steps: {steps}",
        f"  memory a worker: {stage.memory / GIB:.2f} GiB: weights {stage.weights / GIB:.2f}, gradients "
        f"{stage.gradients / GIB:.2f}, optimizer {stage.optimizer / GIB:.2f}, activations {stage.activations / GIB:.2f}",
        f"  memory of its machine: {stage.host_memory(not train.gpus_per_worker) / GIB:.2f} GiB: libraries "
        f"{LIBRARIES / GIB:.2f}, rows ahead {stage.ahead / GIB:.2f}, and the larger of: the base while it is loaded or merged "
        f"{stage.loading / GIB:.2f}; checkpoints under way {stage.kept / GIB:.2f}"
        + ("" if train.gpus_per_worker else " and training"),
    ]
    if stage.guessed:
        lines.append("  the encoder's operations and activations are guessed from its number of weights")
    if stage.steps is not None:
        lines.append(f"  operations: {stage.steps * stage.rows_per_step * stage.flops / 1e15:,.2f} PFLOP")
    if peak and (seconds := stage.seconds(peak, train.workers, train.mfu)):
        rate = f"{100 * train.mfu:.0f} % of {peak / 1e12:g} TFLOP/s"
        lines.append(f"  time: {seconds / 3600:.2f} h on {train.workers} workers at {rate} each")
    elif stage.steps is not None:
        lines.append("  time: unknown, set train.peak_tflops to what a worker can do")
    return "\n".join(lines)


def model_shape(config: Config) -> ModelShape:
    """Build the base model and its adapter from config.json and processor files, without weights.

    Raises:
        InputError: the files are missing.
    """
    base, options = local(config.model.base), {"trust_remote_code": config.model.trust_remote_code}
    try:
        architecture = AutoConfig.from_pretrained(base, **options)
        processor = AutoProcessor.from_pretrained(base, backend="pil", **options)
        return shape_of(architecture, processor, config)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise InputError(
            f"an estimate for '{config.model.base}' needs its config.json and processor files, not its weights "
            f"({' '.join(str(error).split())[:200]}): download those, or unset HF_HUB_OFFLINE."
        ) from error


def shape_of(architecture: Any, processor: Any, config: Config) -> ModelShape:
    """The base model that a configuration of transformers describes, and its adapter, without weights."""
    with torch.device("meta"):
        bare = AutoModelForImageTextToText.from_config(
            architecture, dtype=getattr(torch, config.model.dtype), trust_remote_code=config.model.trust_remote_code
        )
        model, parts = attach_lora(bare, config.model)
    totals: dict[Part, int] = dict.fromkeys(parts, 0)
    for name, weights in model.get_base_model().named_parameters():
        if "lora_" not in name and ".modules_to_save." not in name:
            totals[part_of(name, parts) or "llm"] += weights.numel()  # the output head counts as the language model's
    return ModelShape(model, parts, processor, totals)


def estimate_stages(
    config: Config, system: SystemConfig, shape: ModelShape, photos: int | None = None, cpu: bool = False
) -> list[StageEstimate]:
    """Estimate all stages of a system.

    Args:
        photos: number of photos, where the tables are not there yet.
        cpu: whether it trains on CPUs, where attention keeps a number for each pair of tokens.
    """
    stages = [_estimate_stage(config, name, shape, photos, cpu) for name in system.stages]
    if system.match_steps_of and stages:
        reference = next(s for s in config.train.systems if s.name == system.match_steps_of)
        total = [_rows_and_steps(config, name, photos)[2] for name in reference.stages]
        before = [stage.steps for stage in stages[:-1]]
        known = None not in (*total, *before)
        stages[-1].steps = remaining_steps(system, sum(n or 0 for n in total), sum(n or 0 for n in before)) if known else None
    return stages


def _rows_and_steps(config: Config, name: str, photos: int | None) -> tuple[RowSource | None, int | None, int | None]:
    """A stage's table, rows of an epoch and steps, as far as they are known."""
    stage = config.train.stages[name]
    try:
        table: RowSource | None = training_rows(config, stage.tables, stage.locatability)
    except InputError:
        table = None
    rows = len(table) if table is not None else photos and photos * len(stage.tables)
    per_step = stage.batch_size * stage.gradient_accumulation_steps * config.train.workers
    return table, rows, count_steps(rows, per_step, stage.epochs, stage.max_steps) if rows else stage.max_steps


def _estimate_stage(config: Config, name: str, shape: ModelShape, photos: int | None, cpu: bool) -> StageEstimate:
    train, stage = config.train, config.train.stages[name]
    table, rows, steps = _rows_and_steps(config, name, photos)
    samples = _sample_rows(config, stage, shape, table)
    tokens = sum(len(sample.ids) for sample in samples) / len(samples)
    longest = max(samples, key=lambda sample: len(sample.ids))
    answers = sum(label != IGNORE_INDEX for sample in samples for label in sample.labels) / len(samples)
    set_trainable_parts(shape.model, shape.parts, stage.parts)
    cost = row_cost(shape.model, shape.parts, longest.pixels, len(longest.ids), round(answers), train.checkpoint_activations)
    trained: dict[Part, int] = dict.fromkeys(shape.parts, 0)
    for path, parameter in shape.model.named_parameters():
        if parameter.requires_grad:
            trained[part_of(path, shape.parts) or "llm"] += parameter.numel()
    shard = sum(trained.values()) / (train.workers if train.strategy != "ddp" else 1)
    pair_bytes = (4 if config.model.dtype == "float32" else 2) if cpu else 0
    return StageEstimate(
        name, trained, rows, steps, tokens, len(longest.ids),
        rows_per_step=stage.batch_size * stage.gradient_accumulation_steps * train.workers,
        flops=cost.flops * tokens / len(longest.ids),
        weights=_weight_bytes(shape.model, train.strategy, train.workers),
        gradients=4.0 * shard,
        optimizer=8.0 * shard,
        activations=stage.batch_size * (cost.activations + cost.pairs * pair_bytes),
        guessed=cost.guessed,
        loading=_base_bytes(shape),
        ahead=_rows_ahead(config, stage, longest),
        kept=4.0 * (sum(weights.numel() for _, weights in adapter_weights(shape.model)) + 2 * sum(trained.values())),
    )  # fmt: skip


def _sample_rows(config: Config, stage: StageConfig, shape: ModelShape, table: RowSource | None) -> list[EncodedSample]:
    """Encoded rows of the table, or an invented one where it is not there yet."""
    collator = Collator(shape.processor, stage.isolate_questions, context=context_length(shape.model.get_base_model()))
    if table is None:
        photos = "photos" in stage.tables
        question = templates("street", "choice")[0].format(options="; ".join(["Forbes Avenue"] * 4))
        answer = "Forbes Avenue, Oakland" if photos else "Forbes Avenue runs there. " * 12
        image = Image.new("RGB", (config.tiles.pixels, config.tiles.pixels))
        tile = image if config.tiles.layout == "two" and "alignment" in stage.tables else None
        return [collator.encode(Sample(image, [(question, answer)] * (config.city.rounds if photos else 1), tile=tile))]
    total, samples = int(table.starts[-1]), []
    for index in range(0, total, max(1, total // SAMPLED_ROWS)):
        try:
            samples.append(collator.encode(sample_from_row(table[index])))
        except SkipSampleError:
            continue
    if not samples:
        raise InputError("none of the sampled training rows can be used: look at the photos and prepare the data again.")
    return samples


def _base_bytes(shape: ModelShape) -> float:
    """Bytes of the base's weights as stored."""
    adapter = {id(weights) for _, weights in adapter_weights(shape.model)}
    return float(sum(weights.nbytes for weights in shape.model.parameters() if id(weights) not in adapter))


def _rows_ahead(config: Config, stage: StageConfig, longest: EncodedSample) -> float:
    """Bytes of row groups in memory, of steps that are encoded ahead, and of the processes that do it."""
    processes = loader_processes(config.train, on_gpu=config.train.gpus_per_worker > 0)
    steps = STEPS_A_PROCESS * max(1, processes)
    pixels = sum(value.numel() for value in longest.pixels.values())  # a byte each
    a_step = stage.batch_size * stage.gradient_accumulation_steps * (pixels + 32 * len(longest.ids))
    return CACHED_GROUPS * ROWS_PER_GROUP * ROW_BYTES + steps * a_step + processes * LIBRARIES


def _weight_bytes(model: Any, strategy: str, workers: int) -> float:
    """Bytes of a worker's weights: its shard where they are sharded, and what is gathered for computing."""

    def size(module: torch.nn.Module) -> float:
        return float(sum(weights.numel() * weights.itemsize for weights in module.parameters()))

    total = size(model)
    if strategy not in SHARDS_WEIGHTS or workers == 1:
        return total
    if strategy == "fsdp2":  # what is in no layer stays gathered during a step, and the next layer is prefetched
        layers = sorted(size(module) for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
        return total / workers + total - sum(layers[:-2])
    return total / workers + min(total, ZERO3_LIVE * total / sum(weights.numel() for weights in model.parameters()))


def row_cost(
    model: Any, parts: dict[Part, str], pixels: dict[str, torch.Tensor], tokens: int, answers: int, checkpointing: bool = False
) -> RowCost:
    """Cost of a row, by running the parts on PyTorch's meta device; what requires gradients is trained.

    Args:
        pixels: the processor's tensors of the image.
        tokens, answers: number of tokens, and of those with a loss.
        checkpointing: whether a layer keeps only its input, beside which one layer at a time is recomputed.
    """
    AttentionInterface.register(ATTENTION, _counting_attention)
    base = model.get_base_model()
    text = base.config.get_text_config()
    vision, adapter, llm = (base.get_submodule(parts[part]) for part in ("vision", "adapter", "llm"))
    image = {key: value.to("meta", base.dtype if value.is_floating_point() else None) for key, value in pixels.items()}

    def vision_cost() -> RowCost:
        def forward() -> torch.Tensor:
            features = base.get_image_features(**image)
            features = getattr(features, "pooler_output", features)
            return features if isinstance(features, torch.Tensor) else torch.cat(list(features))

        try:
            if getattr(vision.config, "num_attention_heads", None):
                vision.set_attn_implementation(ATTENTION)
            return _count(forward, vision, adapter)
        except RuntimeError:  # a family whose code reads its tensors' values (Qwen-VL)
            return _guess_vision(vision, adapter, pixels["pixel_values"], base.dtype, checkpointing)

    def language_cost() -> RowCost:
        llm.set_attn_implementation(ATTENTION)
        row = torch.empty(1, tokens, text.hidden_size, device="meta", dtype=base.dtype, requires_grad=True)
        return _count(lambda: llm(inputs_embeds=row, use_cache=False).last_hidden_state, llm)

    cost = RowCost(4.0 * answers * text.hidden_size * text.vocab_size, answers * text.vocab_size * 4.0 * 3)  # logits
    for measure, part in ((vision_cost, vision), (language_cost, llm)):
        full = measure()
        if checkpointing and not full.guessed:
            training = model.training
            checkpoint_activations(model.train(), True)
            try:
                inputs = measure().activations
            finally:
                checkpoint_activations(model.train(training), False)
            layers = max(1, sum(isinstance(module, GradientCheckpointingLayer) for module in part.modules()))
            full = RowCost(full.flops, inputs + (full.activations - inputs) / layers, full.pairs / layers)
        cost = full + cost
    return cost


def _guess_vision(vision: Any, adapter: Any, pixels: torch.Tensor, dtype: torch.dtype, checkpointing: bool) -> RowCost:
    """Two operations per weight, patch and pass; 16 numbers kept per channel, layer and patch, or one with checkpointing."""
    config = vision.config
    depth = getattr(config, "num_hidden_layers", 0) or getattr(config, "depth", 12)
    patches = pixels.numel() / (3 * getattr(config, "patch_size", 16) ** 2)
    weights = [*vision.parameters(), *adapter.parameters()]
    trained = any(p.requires_grad for p in weights)
    kept = (depth + 16.0 if checkpointing else 16.0 * depth) * patches * config.hidden_size * dtype.itemsize * trained
    return RowCost(2.0 * (3 if trained else 1) * sum(p.numel() for p in weights) * patches, kept, guessed=True)


_counting: list[RowCost] = []  # the cost being counted, to which attention adds its share


def _count(forward: Callable[[], torch.Tensor], *modules: torch.nn.Module) -> RowCost:
    """Cost of the forward pass, and of the backward pass if something learns by it."""
    saved: dict[int, torch.Tensor] = {}
    cost = RowCost()

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    _counting.append(cost)
    try:
        with FlopCounterMode(display=False) as counter, saved_tensors_hooks(save, lambda tensor: tensor):
            out = forward()
            if out.requires_grad:
                out.sum().backward()
    finally:
        _counting.pop()
    parameters = [parameter for module in modules for parameter in module.parameters()]
    weights = {parameter.untyped_storage()._cdata for parameter in parameters}
    cost.flops += counter.get_total_flops()
    cost.activations += sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in weights)
    for parameter in parameters:
        parameter.grad = None
    return cost


class _FlashAttention(torch.autograd.Function):
    """Saves what flash attention saves; its result has the right shape only."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _counting_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[Any, None]:
    """An attention function of transformers; both passes cost three times the forward pass."""
    batch, heads, tokens, width = query.shape
    pairs = batch * heads * tokens * key.shape[2]
    causal = 0.5 if getattr(module, "is_causal", False) else 1.0
    _counting[-1].flops += 4 * pairs * causal * width * (3 if query.requires_grad else 1)
    _counting[-1].pairs += pairs * query.requires_grad
    return _FlashAttention.apply(query, key, value).transpose(1, 2), None
