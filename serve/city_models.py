"""The cities of a replica on one base model: each has a localizer, that of a merged model or of an adapter loaded on demand."""

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import load_peft_weights, set_peft_model_state_dict

from addressvlm import InputError
from addressvlm.answers.chat_model import use_float32_head
from addressvlm.inference import Localizer
from addressvlm.models.loading import load_model, to_device
from addressvlm.storage.files import local_model_copy
from serve.cities import City, base_model
from serve.settings import ServiceSettings


class CityModels:
    """Loads and evicts adapters; any thread may use it.

    Args:
        call: runs a function that changes the model in the model's thread, and returns its result.

    Attributes:
        localizers: by city, the most recently used last.
        model: the base model that all share.

    Raises:
        InputError: the model can't be loaded.
    """

    def __init__(self, settings: ServiceSettings, cities: Sequence[City], call: Callable[[Callable[[], None]], Any]) -> None:
        self.settings, self._call = settings, call
        self.cities = {city.id: city for city in cities}
        self.localizers: OrderedDict[str, Localizer] = OrderedDict()
        self.adapters: PeftModel | None = None
        options: dict[str, Any] = {"dtype": settings.dtype, "trust_remote_code": settings.trust_remote_code}
        first = cities[0]
        if first.adapter is None:
            localizer = Localizer(first.folder, memory_mb=settings.photo_memory_mb, **options)
            self.localizers[first.id], self.processor, self.model = localizer, localizer.processor, localizer.model
        else:
            self.base_name = base_model(cities, settings.base)
            base, self.processor = load_model(self.base_name, **options)
            self.model = to_device(base, "cuda" if torch.cuda.is_available() else "cpu")
            use_float32_head(self.model)
        self._numbers = {city.id: f"city{number}" for number, city in enumerate(cities)}  # PEFT takes no dots in names
        self._uses: dict[str, int] = defaultdict(int)
        self._loading, self._lock = threading.Lock(), threading.Lock()

    def acquire(self, city: str) -> Localizer:
        """A city's localizer, loaded beside the model's thread if need be; it stays until `release`.

        Raises:
            InputError: its adapter does not fit the base.
        """
        localizer = self.acquire_loaded(city)
        if localizer is None:
            with self._loading:
                if city not in self.localizers:
                    localizer = self._load(city)
                    with self._lock:
                        self.localizers[city] = localizer
                localizer = self.acquire_loaded(city)
                self._evict()
        assert localizer
        return localizer

    def acquire_loaded(self, city: str) -> Localizer | None:
        """As `acquire` for a city that is loaded; None if it is not."""
        with self._lock:
            if localizer := self.localizers.get(city):
                self.localizers.move_to_end(city)
                self._uses[city] += 1
            return localizer

    def release(self, city: str) -> None:
        """Allow that the city is evicted."""
        with self._lock:
            self._uses[city] -= 1

    def _load(self, city: str) -> Localizer:
        name, adapter = self._numbers[city], local_model_copy(self.cities[city].adapter or "")
        try:
            config = PeftConfig.from_pretrained(str(adapter))
            weights = load_peft_weights(str(adapter), device=str(self.model.device))
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{adapter} is no adapter that can be read: {' '.join(str(error).split())[:300]}.") from error
        config.inference_mode = True
        weights = {key: tensor.to(self.model.dtype) for key, tensor in weights.items()}
        try:
            self._call(partial(self._attach, name, config, weights))
        except (ValueError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{adapter} can't be put on the base model {self.base_name}, it was trained on "
                f"{config.base_model_name_or_path} ({reason}): serve it on that one, or train the city again."
            ) from error
        memory_mb = self.settings.photo_memory_mb / min(self.settings.cities_per_replica, len(self.cities))
        localizer = Localizer(
            self.cities[city].folder,
            memory_mb=memory_mb,
            loaded=(self.model, self.processor),
            adapters=self.adapters,
            adapter=name,
        )
        if localizer.gazetteer and localizer.gazetteer.addresses:
            _ = localizer.scorer  # made here, not in the model's thread: it takes a while
        return localizer

    def _attach(self, name: str, config: PeftConfig, weights: dict[str, torch.Tensor]) -> None:
        """Put an adapter's weights on the base, in the base's dtype."""
        first = self.adapters is None
        if self.adapters is None:
            self.adapters = PeftModel(self.model, config, name, autocast_adapter_dtype=False)
        else:
            self.adapters.add_adapter(name, config, autocast_adapter_dtype=False)
        try:
            result = set_peft_model_state_dict(self.adapters, weights, name)
            missing = [key for key in result.missing_keys if name in key.split(".")]
            if missing or result.unexpected_keys:
                raise ValueError(f"{(missing or result.unexpected_keys)[0]} is in only one of them")
        except (ValueError, RuntimeError, KeyError):
            if first:
                self.adapters.unload()
                self.adapters = None
            else:
                self.adapters.delete_adapter(name)
            raise
        self.adapters.eval()

    def _evict(self) -> None:
        """Remove the least recently used adapters beyond `cities_per_replica` that no request uses."""
        with self._lock:
            idle = [city for city in self.localizers if not self._uses[city]]
            evicted = idle[: max(0, len(self.localizers) - self.settings.cities_per_replica)]
            for city in evicted:
                del self.localizers[city]
        for city in evicted:
            self._call(partial(self._detach, self._numbers[city]))

    def _detach(self, name: str) -> None:
        assert self.adapters
        if self.adapters.active_adapter == name:
            self.adapters.set_adapter(next(other for other in self.adapters.peft_config if other != name), inference_mode=True)
        self.adapters.delete_adapter(name)
