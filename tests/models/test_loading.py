"""Base models that can't be used, and which can be packed

python -m pytest -q tests/models/test_loading.py
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from addressvlm import InputError
from addressvlm.models import load_model
from addressvlm.models.families import has_1d_positions
from addressvlm.models.loading import enable_packing


@pytest.fixture
def loaded(base: Path) -> tuple[Any, Any]:
    return load_model(str(base))


def spoiled(base: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the base with some of its files changed (None: removed)."""
    shutil.copytree(base, folder)
    for name, change in changes.items():
        file = next(path for path in folder.iterdir() if path.stem == name)
        if change is None:
            file.unlink()
        else:
            file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    return folder


def test_a_model_with_another_attention_is_not_packed(loaded: tuple) -> None:
    model, _ = loaded
    assert not enable_packing(model, "off", torch.device("cpu"), "tiny")
    assert not enable_packing(model, "auto", torch.device("cuda"), "tiny")
    model.config.get_text_config().sliding_window = 16
    assert not enable_packing(model, "auto", torch.device("cpu"), "tiny")
    with pytest.raises(InputError, match=r"train.packing is on, which the attention of tiny \(llama\) does not allow"):
        enable_packing(model, "on", torch.device("cpu"), "tiny")


def test_a_model_with_positions_by_image_row_and_column_is_told_apart(loaded: tuple) -> None:
    with torch.device("meta"):
        qwen = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig())
    assert not has_1d_positions(qwen)
    assert has_1d_positions(loaded[0])


def test_a_base_without_a_chat_template_is_an_error(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no chat template: add chat_template\.jinja"):
        load_model(str(spoiled(base, tmp_path / "spoiled", chat_template=None)))


@pytest.mark.parametrize("file", ["tokenizer", "processor_config", "model"])
def test_a_base_with_a_missing_file_is_one_sentence(base: Path, tmp_path: Path, file: str) -> None:
    with pytest.raises(InputError, match="can't be loaded") as caught:
        load_model(str(spoiled(base, tmp_path / "spoiled", **{file: None})))
    assert "\n" not in str(caught.value)
