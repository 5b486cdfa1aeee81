"""Export a merged model with the weight names that vLLM expects.

    python -m addressvlm.tools.export_vllm runs/demo/models/addressvlm/merged /tmp/for-vllm

transformers saves the layers of a CLIP or SigLIP tower as `vision_tower.…`, but vLLM expects `vision_tower.vision_model.…`.
transformers also loads the export.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from addressvlm.errors import InputError
from addressvlm.storage.run_dir import storage_error

TOWERS = ("clip_vision_model", "siglip_vision_model")
FLAT, NESTED = "vision_tower.", "vision_tower.vision_model."
INDEX = "model.safetensors.index.json"


def vllm_name(name: str, vision: str) -> str:
    """The name of a weight in vLLM; `vision` is the `model_type` of the vision encoder."""
    start = name.find(FLAT)
    if vision not in TOWERS or start < 0 or name.startswith(NESTED, start):
        return name
    return name[:start] + NESTED + name[start + len(FLAT) :]


def export_for_vllm(merged: Path, out: Path) -> None:
    """Copy a model folder to `out` with renamed weights; one file of weights is in memory at a time.

    Raises:
        InputError: `merged` holds no merged model, its weights can't be read, or `out` exists or can't be written.
    """
    merged, out = Path(merged), Path(out)
    vision = _vision_type(merged)
    partial = out.with_name(out.name + ".partial")
    try:
        if out.exists():
            raise InputError(f"{out} exists: remove it, or give another folder.")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(merged, partial, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
        for file in sorted(merged.glob("*.safetensors")):
            with safe_open(file, "pt") as weights:
                renamed = {vllm_name(name, vision): weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
            save_file(renamed, partial / file.name, metadata={"format": "pt"})
        if (merged / INDEX).is_file():
            index = json.loads((merged / INDEX).read_text(encoding="utf-8"))
            index["weight_map"] = {vllm_name(name, vision): file for name, file in index["weight_map"].items()}
            (partial / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        partial.rename(out)
    except OSError as error:
        raise storage_error(error, out) from error
    except SafetensorError as error:
        raise InputError(f"the weights in {merged} can't be read ({error}): save the model again.") from None


def _vision_type(merged: Path) -> str:
    """`model_type` of the vision encoder, empty for a model without one.

    Raises:
        InputError: the folder holds an adapter or no model at all.
    """
    if (merged / "adapter_config.json").is_file():
        raise InputError(f"{merged} holds an adapter: give the folder `merged` next to it, vLLM needs merged weights.")
    if not (merged / "config.json").is_file() or not any(merged.glob("*.safetensors")):
        raise InputError(f"{merged} holds no model (config.json and *.safetensors): give the folder that training merged.")
    config: dict[str, Any] = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    return str(config.get("vision_config", {}).get("model_type", ""))


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("merged", type=Path, help="a model folder, for instance <run>/models/<system>/merged")
    parser.add_argument("out", type=Path, help="folder to write; it must not exist")
    args = parser.parse_args(argv)
    try:
        export_for_vllm(args.merged, args.out)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"{args.out}: serve it with `vllm serve {args.out}`")


if __name__ == "__main__":
    main()
