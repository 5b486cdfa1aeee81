"""The sections `evaluate` and `compare` of the configuration: metrics, baselines, and the variants of an ablation."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from addressvlm.config.base import Section


class EvaluateConfig(Section):
    """Answers to the questions about test photos, and their metrics; its workers also serve the other jobs with a model."""

    workers: int = Field(2, ge=1)
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)
    batch_size: int = Field(64, ge=1)  # questions at a time
    max_new_tokens: int | None = Field(None, ge=1)  # of free answers; default: room for the city's longest address
    temperature: float = Field(0.0, ge=0)  # of free answers; 0 is greedy; paper 001 uses 0.1
    # free: the model's own words, as in paper 001; constrained: only the city's names are possible; likelihood: all answers
    # follow from the probabilities of all addresses
    answers: Literal["free", "constrained", "likelihood"] = "free"
    # What the model sees. grafts: each photo on the tile of its true place, which gives the place away: for ablations only
    # (docs/comparison.md)
    images: Literal["photos", "grafts"] = "photos"
    max_photos: int | None = Field(None, ge=1)  # evaluate only so many, drawn by seed
    bootstrap: int = Field(1000, ge=100)  # resamples of places for the 95 % intervals
    calibration_photos: int = Field(256, ge=0)  # of the split `val`, to calibrate probabilities on; 0: no calibration
    # accuracy of the answers that are not "don't know"; the confidence below which it is "don't know" is fitted to it
    target_precision: float = Field(0.8, gt=0, lt=1)


class BaselineConfig(Section):
    """A system that is not trained by `train.stages`."""

    name: str


class LikelihoodConfig(BaselineConfig):
    """A system of `train.systems` that answers by its probabilities of all addresses instead of its own words."""

    kind: Literal["likelihood"]
    of: str = "AddressVLM"


class EncoderConfig(Section):
    """What turns a photo into a vector."""

    # Folder or hub name of a CLIP, SigLIP, DINOv2 or other image encoder of transformers, a CLIP or SigLIP of open_clip,
    # MegaLoc, DINOv2 SALAD, or a vision-language model, whose vision encoder is taken; default: model.base
    base: str | None = None
    batch_size: int = Field(32, ge=1)  # photos at a time


class RetrievalConfig(BaselineConfig):
    """Image -> GPS -> address (paper 002, Sec. 6.5): the nearest training photo's coordinates, reverse geocoded."""

    kind: Literal["retrieval"]
    encoder: EncoderConfig = EncoderConfig()
    neighbours: int = Field(1, ge=1)  # above 1, each votes with its similarity


class RagConfig(BaselineConfig):
    """A language model that sees the photo and reads where similar and dissimilar photos were taken (paper 004)."""

    kind: Literal["rag"]
    encoder: EncoderConfig = EncoderConfig()
    model: str | None = None  # folder, hub name or a system of `train.systems`; default: model.base, never tuned
    endpoint: str | None = None  # of an OpenAI-compatible server, where `model` names the model; the key is in OPENAI_API_KEY
    ask: Literal["coordinates", "addresses"] = "coordinates"  # what the prompt lists and asks for
    similar: int = Field(16, ge=0)
    dissimilar: int = Field(16, ge=0)
    strategy: Literal["farthest", "random", "centroid"] = "farthest"  # what dissimilar means
    form: Literal["json", "sentences"] = "json"
    order: Literal["similar first", "dissimilar first"] = "similar first"
    degrees: Literal["decimal", "dms"] = "decimal"
    max_new_tokens: int = Field(64, ge=1)
    temperature: float = Field(0.1, ge=0)


class LossWeights(Section):
    """Weights of AddressCLIP's three losses (paper 002, Sec. 6.1)."""

    address: float = Field(1.0, ge=0)
    caption: float = Field(0.2, ge=0)
    geography: float = Field(0.8, ge=0)


class AddressClipConfig(BaselineConfig):
    """A dual encoder whose nearest address text is the answer (paper 002)."""

    kind: Literal["addressclip"]
    # Folder or hub name of a CLIP- or SigLIP-like model of transformers or open_clip; default: the vision encoder and the
    # language model of model.base with new projections
    base: str | None = None
    # alignment: the explanations that stage 1 learns from; reasoning: a model's texts about the photos alone, without a map
    captions: Literal["template", "alignment", "reasoning", "none"] = "template"
    weights: LossWeights = LossWeights()
    train_image: bool = True
    train_text: bool = True
    epochs: float = Field(10.0, ge=0)  # paper 002: 100; 0: the base as it is, zero-shot
    max_steps: int | None = Field(None, ge=1)
    batch_size: int = Field(32, ge=2)  # photos per worker and step; all workers' photos are each other's negatives
    learning_rate: float = Field(2.4e-5, gt=0)  # paper 002, Sec. 6.1
    projection_learning_rate: float = Field(1e-3, gt=0)  # of randomly initialised projections
    weight_decay: float = Field(0.0, ge=0)
    warmup_ratio: float = Field(0.05, ge=0, lt=1)  # share of the steps

    @model_validator(mode="after")
    def _has_a_base(self) -> AddressClipConfig:
        if self.epochs == 0 and self.base is None:
            raise ValueError(f"'{self.name}' is not trained (epochs is 0), so it needs a dual encoder: set base to a CLIP")
        return self


class GuessConfig(BaselineConfig):
    """Answers without a look at the photo, from the training questions alone: what every other system must beat."""

    kind: Literal["guess"]
    by: Literal["commonest", "random"] = "commonest"  # the commonest answer to such a question, or any at random


class BlindConfig(BaselineConfig):
    """A system of `train.systems` that is shown a grey picture instead of the photo; it answers by its probabilities."""

    kind: Literal["blind"]
    of: str = "AddressVLM"


class FusionConfig(BaselineConfig):
    """Probabilities of several systems as one: a weighted sum of their logarithms, weights fitted on the split `val`."""

    kind: Literal["fusion"]
    of: list[str] = Field(min_length=2)  # systems that have scores: of `train.systems`, or baselines that stand before it


class SimulatedPriorConfig(Section):
    """Prior information about each photo, drawn from its true address (`evaluation.likelihood`); all parts hold together."""

    district: bool = False  # the true one
    streets: int | None = Field(None, ge=1)  # W: so many, the true one among them
    gps_m: float | None = Field(None, gt=0, allow_inf_nan=False)  # metres; a position is off by less in 95 of 100 photos


class PriorConfig(BaselineConfig, SimulatedPriorConfig):
    """Another system with prior information about each photo (paper 002, D.1, Table 12)."""

    kind: Literal["prior"]
    of: str  # a system that has scores: of `train.systems`, or a baseline that stands before it

    @model_validator(mode="after")
    def _is_a_prior(self) -> PriorConfig:
        if not (self.district or self.streets or self.gps_m):
            raise ValueError(f"'{self.name}' has no prior: set district, streets or gps_m")
        return self


AnyBaseline = Annotated[
    LikelihoodConfig | RetrievalConfig | RagConfig | AddressClipConfig | GuessConfig | BlindConfig | FusionConfig | PriorConfig,
    Field(discriminator="kind"),
]


class VariantConfig(Section):
    """A system of an ablation: trained in a run of its own with some settings changed."""

    name: str
    config: str | None = None  # a preset or YAML file whose sections labels, model and train replace the run's
    set: dict[str, Any] = {}  # key -> value, as --set
    system: str = "AddressVLM"  # of `train.systems`, the one that is trained


class CompareConfig(Section):
    """The systems of a comparison beside those of `train.systems`."""

    systems: list[AnyBaseline] = []
    variants: list[VariantConfig] = []
    main: str = "AddressVLM"  # the system that all others are tested against

    @model_validator(mode="after")
    def _names_differ(self) -> CompareConfig:
        counts = Counter(system.name for system in [*self.systems, *self.variants])
        if same := [name for name, count in counts.items() if count > 1]:
            raise ValueError(f"two systems are called '{same[0]}': give each its own name")
        return self
