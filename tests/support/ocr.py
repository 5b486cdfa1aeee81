"""Street names read back from a tile by an OCR engine, and how near they come to the names that it should show."""

import numpy as np
import pytest
from PIL import Image

TURNS = (0,)
NEAR = 0.2  # letters that may be wrong, as a share of the name's


class Reader:
    """The engine; it needs a second to start."""

    def __init__(self) -> None:
        rapidocr = pytest.importorskip("rapidocr", reason="rapidocr and onnxruntime (extra `dev`) read the names")
        one = {"EngineConfig.onnxruntime.intra_op_num_threads": 1, "EngineConfig.onnxruntime.inter_op_num_threads": 1}
        self._engine = rapidocr.RapidOCR(params={"Global.log_level": "error", **one})

    def read(self, tile: Image.Image) -> list[str]:
        """All lines of text found on the tile."""
        result: list[str] = []
        for turn in TURNS:
            pixels = np.asarray(tile.rotate(turn, Image.Resampling.BICUBIC, expand=True, fillcolor=(242, 239, 233)))
            result += self._engine(pixels[:, :, ::-1]).txts or []
        return result


def letters(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())


def wrong(name: str, texts: list[str]) -> float:
    """Letters wrong in the best reading of a name, as a share of its letters (1 if it was not read)."""
    expected = letters(name)
    return min((_edits_inside(expected, letters(text)) for text in texts), default=len(expected)) / len(expected)


def _edits_inside(name: str, text: str) -> int:
    """Edits between a name and the part of a text that is most like it (the ends of the text are free)."""
    row = [0] * (len(text) + 1)
    for number, letter in enumerate(name, start=1):
        following = [number]
        for at, other in enumerate(text, start=1):
            following.append(min(row[at] + 1, following[-1] + 1, row[at - 1] + (letter != other)))
        row = following
    return min(row)
