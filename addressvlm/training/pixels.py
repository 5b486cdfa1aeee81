"""Images from encoded files to pixel values: decoded at the scale needed, moved as bytes, normalized on the device."""

import io
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from transformers.image_processing_backends import PilBackend

from addressvlm.config.train import AugmentConfig

ASPECT = 4 / 3  # largest change of a crop's aspect ratio
RESAMPLE = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}  # Pillow's name -> PyTorch's
PIXELS = "pixel_values"
MASK = "pixel_attention_mask"  # of the pixels that are no padding (Idefics3)


def decode(data: bytes, size: tuple[int, int] | None = None) -> Image.Image:
    """An encoded image as RGB.

    Args:
        size: width and height it will be resized to; a JPEG of at least twice that is decoded at 1/2, 1/4 or 1/8 of its size.

    Raises:
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: it can't be decoded.
    """
    with Image.open(io.BytesIO(data)) as picture:
        if size:
            picture.draft(None, size)
        picture.load()
        return picture if picture.mode == "RGB" else picture.convert("RGB")


def decoded_size(image_processor: Any, augment: AugmentConfig) -> tuple[int, int] | None:
    """The width and height that `decode` needs for a processor, None if they depend on the image's own."""
    size = dict(image_processor.size)
    width, height = (size.get(key) or size.get("shortest_edge") for key in ("width", "height"))
    if not width or not height or "longest_edge" in size or not image_processor.do_resize:
        return None
    scale = ASPECT / augment.crop if augment.crop < 1 else 1.0  # of the whole photo to the crop that is shown
    return math.ceil(width * scale), math.ceil(height * scale)


class PixelEncoder:
    """Resizes images for a processor, has it leave their values as bytes, and normalizes those on the device.

    A processor rescales and normalizes each byte of an image by itself. Without that it is quicker, and its output a quarter
    of the size; the same numbers to the last bit are looked up later, on the device.

    Attributes:
        options: for the processor's call.
    """

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor
        self.options: dict[str, Any] = {}
        self._normalized: torch.Tensor | None = None  # the value of each byte in each channel, float32 (3, 256)
        cls, size = type(image_processor), dict(image_processor.size)
        standard = cls._preprocess is PilBackend._preprocess and cls.resize is PilBackend.resize
        fixed = image_processor.do_resize and not image_processor.do_center_crop and {"height", "width"} <= size.keys()
        self._size = (size["width"], size["height"]) if standard and fixed else None
        if self._size:
            self.options["do_resize"] = False

    def prepare(self, image: Image.Image) -> Image.Image:
        """An RGB image as the processor takes it: of its size if that is fixed.

        PyTorch resizes bytes in a quarter of Pillow's time; of a photo half a percent of the values differ, by 1 or 2 of 255.
        """
        if self._size is None or image.size == self._size:
            return image
        mode = RESAMPLE.get(self.image_processor.resample)
        if mode is None:
            return image.resize(self._size, self.image_processor.resample)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        resized = F.interpolate(pixels, size=self._size[::-1], mode=mode, antialias=True)
        return Image.fromarray(resized[0].permute(1, 2, 0).numpy())

    def use_bytes(self, processor: Any, prompt: str) -> None:
        """From now on let the processor leave bytes as they are, if `normalize` makes of them what it would.

        Args:
            prompt: a text that shows one image.
        """
        image_processor = self.image_processor
        if not (image_processor.do_rescale and image_processor.do_normalize):
            return
        try:
            every_byte = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
            scaled = image_processor.rescale(every_byte, image_processor.rescale_factor)
            normalized = image_processor.normalize(scaled, image_processor.image_mean, image_processor.image_std)
            noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
            image = self.prepare(Image.fromarray(noise))
            expected = processor(text=[prompt], images=[image], **self.options)
            keep_bytes = {"do_rescale": False, "do_normalize": False}
            output = processor(text=[prompt], images=[image], **self.options, **keep_bytes)
        except (TypeError, ValueError, AttributeError, KeyError, RuntimeError):
            return
        self._normalized = torch.from_numpy(np.ascontiguousarray(normalized[:, 0]))
        inputs = {key: tensor_of(output[key]) for key in (PIXELS, MASK) if key in output}
        inputs[PIXELS] = as_bytes(inputs[PIXELS])
        if inputs[PIXELS].dtype == torch.uint8 and torch.equal(self.normalize(inputs)[PIXELS], tensor_of(expected[PIXELS])):
            self.options |= keep_bytes
        else:
            self._normalized = None

    def normalize(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Inputs whose pixels, if they are bytes, are the processor's float32 values; on the device of the inputs."""
        pixels = inputs.get(PIXELS)
        if pixels is None or pixels.dtype != torch.uint8:
            return inputs
        assert self._normalized is not None
        self._normalized = self._normalized.to(pixels.device)
        channels = pixels.view(len(pixels), 3, -1) if pixels.dim() == 2 else pixels.flatten(0, -4)  # (N, 3, …)
        first = torch.arange(0, 768, 256, device=pixels.device, dtype=torch.int32).view(3, *[1] * (channels.dim() - 2))
        values = self._normalized.flatten().index_select(0, (channels.int() + first).flatten()).view(pixels.shape)
        if MASK in inputs:
            values *= inputs[MASK].unsqueeze(-3)
        return {**inputs, PIXELS: values}


def as_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels that are whole numbers from 0 to 255 as uint8, others as they are."""
    if pixels.dtype == torch.uint8:
        return pixels
    small = pixels.to(torch.uint8)
    return small if torch.equal(small.to(pixels.dtype), pixels) else pixels


def tensor_of(values: Any) -> torch.Tensor:
    """A processor's output for one sample's images as one tensor."""
    if isinstance(values, list | tuple) and values and not isinstance(values[0], int | float):
        pieces = [tensor_of(value) for value in values]
        return torch.cat([piece[None] if piece.dim() in (0, 1, 3) else piece for piece in pieces])
    return torch.as_tensor(values)
