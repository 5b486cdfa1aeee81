import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from addressvlm.models.loading import load_model
from addressvlm.tools.export_vllm import export_for_vllm, main, vllm_name
from tests.support.tiny import tiny_llava


def names_in(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            names |= set(weights.keys())
    return names


def test_weight_names_of_vllm() -> None:
    flat, nested = "vision_tower.embeddings.class_embedding", "vision_tower.vision_model.embeddings.class_embedding"
    assert vllm_name(flat, "clip_vision_model") == nested
    assert vllm_name(nested, "clip_vision_model") == nested
    assert vllm_name(f"model.{flat}", "siglip_vision_model") == f"model.{nested}"
    assert vllm_name(flat, "resnet") == flat
    assert vllm_name("language_model.model.norm.weight", "clip_vision_model") == "language_model.model.norm.weight"


def test_an_export_has_vllm_names_and_loads_in_transformers(tmp_path: Path) -> None:
    merged = tiny_llava(tmp_path / "merged")
    export_for_vllm(merged, tmp_path / "out")
    towers = {name for name in names_in(tmp_path / "out") if name.startswith("vision_tower.")}
    assert towers
    assert all(name.startswith("vision_tower.vision_model.") for name in towers)
    before, after = (load_model(str(folder))[0].state_dict() for folder in (merged, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_index_of_several_files_is_renamed_too(tmp_path: Path) -> None:
    from addressvlm.models.loading import TOY_BASE

    export_for_vllm(TOY_BASE, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == names_in(tmp_path / "out")


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda folder: folder.mkdir(), "holds no model"),
        (lambda folder: (folder.mkdir(), (folder / "adapter_config.json").write_text("{}")), "holds an adapter"),
    ],
)
def test_folders_without_a_merged_model(prepare, sentence: str, tmp_path: Path) -> None:
    prepare(tmp_path / "in")
    with pytest.raises(SystemExit, match=sentence):
        main([str(tmp_path / "in"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_exports_overwrite_nothing_and_report_damaged_weights(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, tmp_path / "in" / "model.safetensors")
    main([str(tmp_path / "in"), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="exists"):
        main([str(tmp_path / "in"), str(tmp_path / "out")])
    (tmp_path / "in" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(SystemExit, match="can't be read"):
        main([str(tmp_path / "in"), str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()
