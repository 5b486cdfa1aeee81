"""Photos before the model: fetched where that is allowed, decoded, and shrunk to the model's size."""

import base64
import binascii
import re

import numpy as np
from prometheus_client.core import Metric
from ray import serve

from addressvlm import InputError
from addressvlm.uploads import LONGEST_SIDE
from serve.decoders import Decoders
from serve.errors import QUIET, refusals_told
from serve.fetch import Fetcher
from serve.records import Records
from serve.settings import ServiceSettings

_DATA_URL = re.compile(r"data:[^,;]*(?:;[^,;]*)*?;base64,", re.IGNORECASE)
_WEB = re.compile(r"\s*(?:[a-z][a-z0-9+.-]*://|file:)", re.IGNORECASE)


class Images:
    """Encoded photo in, pixels out."""

    def __init__(self, settings: ServiceSettings) -> None:
        self.settings, self.records = settings, Records()
        self.decoders = Decoders(settings.image_processes, settings.decode_s, settings.max_megapixels)
        self.fetcher = Fetcher(settings.image_domains, settings.private_addresses, settings.max_body_mb, settings.fetch_s)

    async def read(self, source: bytes | str, side: int = LONGEST_SIDE) -> np.ndarray:
        """Pixels of a photo given by its bytes, as base64, as a data URL or as a web address, uint8 (height, width, 3).

        Raises:
            InputError: it is no photo that can be used.
            ApiError: its web address is not allowed, or gave nothing.
        """
        data = await self._bytes(source) if isinstance(source, str) else source
        with self.records.time("addressvlm_decode_seconds"):
            found = await self.decoders.decode(data, side)
        return np.frombuffer(found.rgb, np.uint8).reshape(found.height, found.width, 3)

    async def _bytes(self, text: str) -> bytes:
        if not _WEB.match(text[:64]):
            return bytes_of(text)
        if not self.settings.image_domains:
            raise InputError(
                "Images are not fetched from web addresses: send the image itself as a data URL (data:image/jpeg;base64,…)."
            )
        return await self.fetcher.get(text.strip())


@serve.deployment(name="Images", logging_config=QUIET)
class ImagesDeployment(Images):
    """The same as a deployment."""

    read = refusals_told(Images.read)

    async def collect(self) -> tuple[str, list[Metric]]:
        """What was counted here, for `/metrics`."""
        return str(serve.get_replica_context().replica_tag), self.records.collect()

    def __del__(self) -> None:
        self.decoders.kill()


def bytes_of(text: str) -> bytes:
    """The bytes of an image given as base64 or as a data URL.

    Raises:
        InputError: it is neither.
    """
    header = _DATA_URL.match(text[:256])
    if header is None and text[:5].lower() == "data:":
        raise InputError("The data URL is not base64: write it as data:image/jpeg;base64,….")
    try:
        return base64.b64decode(re.sub(r"\s+", "", text[header.end() if header else 0 :]), validate=True)
    except (binascii.Error, ValueError):
        raise InputError("The image is not valid base64: encode the file's bytes, with the padding.") from None
