"""The systems of a comparison, one class a kind, each with the protocol `ray_jobs.baselines.system.System`."""

from importlib import import_module
from typing import Any

from addressvlm.config import Config
from addressvlm.config.compare import AnyBaseline, VariantConfig
from addressvlm.config.train import SystemConfig
from ray_jobs.baselines.system import System

KINDS = {  # kind -> module and class; a module, and what it imports, is loaded only for a comparison with a system of its kind
    "generated": ("trained", "TrainedSystem"),  # of train.systems
    "variant": ("trained", "VariantSystem"),  # of compare.variants
    "likelihood": ("trained", "LikelihoodSystem"),
    "retrieval": ("retrieval", "RetrievalSystem"),
    "rag": ("rag", "RagSystem"),
    "addressclip": ("addressclip", "AddressClipSystem"),
    "guess": ("guess", "GuessSystem"),
    "blind": ("trained", "BlindSystem"),
    "fusion": ("trained", "FusionSystem"),
    "prior": ("trained", "PriorSystem"),
}

SystemSettings = SystemConfig | AnyBaseline | VariantConfig


def system_settings(config: Config) -> list[tuple[str, SystemSettings]]:
    """Kind and settings of each system, in the order of the table: train.systems, compare.systems, compare.variants."""
    return [
        *(("generated", system) for system in config.train.systems),
        *((system.kind, system) for system in config.compare.systems),
        *(("variant", variant) for variant in config.compare.variants),
    ]


def load_system(kind: str, settings: SystemSettings) -> System[Any]:
    """The system of a kind."""
    module, name = KINDS[kind]
    system: System[Any] = getattr(import_module(f"{__name__}.{module}"), name)(settings)
    return system
