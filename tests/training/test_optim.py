"""Learning-rate schedule, rates of parts, gradient clipping

python -m pytest -q tests/training/test_optim.py
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from addressvlm.storage.run_dir import Run
from addressvlm.training.dataset import count_steps
from addressvlm.training.optim import clip_and_step, learning_rate
from addressvlm.training.trainer import train_system
from tests.support.training_tables import nothing, trained_config


def test_the_learning_rate_rises_in_a_line_and_falls_as_a_cosine() -> None:
    rates = [learning_rate(step, 12, 2.0, 0.25) for step in range(12)]
    assert rates[:4] == pytest.approx([2 / 3, 4 / 3, 2.0, 2.0])
    assert (rates[6], rates[9]) == pytest.approx((1.5, 0.5))  # a third and two thirds of the way down
    assert [learning_rate(step, 3, 1.0, 0.0) for step in range(3)] == pytest.approx([1.0, 1.0, 0.5])
    assert learning_rate(0, 1, 1.0, 0.5) == 1.0


def test_steps_and_learning_rate() -> None:
    assert count_steps(100, 8, 2, None) == 25
    assert count_steps(3, 8, 1, None) == 1
    assert count_steps(100, 8, 2, 7) == 7
    assert count_steps(100, 8, 2, 70) == 25
    assert count_steps(30, 8, 1, None) == 4  # of 3.75
    assert count_steps(100, 8, 0.5, None) == 6
    rates = [learning_rate(s, 100, 1.0, 0.1) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[-1] < 0.001


@pytest.mark.parametrize(("clip", "share", "moved"), [(1.0, 1.0, 0.2), (10.0, 0.5, 0.5)])
def test_gradients_are_clipped_to_the_norm_and_cleared(clip: float, share: float, moved: float) -> None:
    weights = torch.nn.Parameter(torch.zeros(2))
    weights.grad = torch.tensor([3.0, 4.0])
    optimizer = torch.optim.SGD([{"params": [weights], "share": share}], lr=9.0)
    assert float(clip_and_step(optimizer, [weights], clip, 1.0)) == pytest.approx(5)
    assert weights.tolist() == pytest.approx([-3 * moved, -4 * moved], rel=1e-4)
    assert weights.grad is None


def test_parts_learn_at_their_own_rates(tmp_path: Path, base: Path) -> None:
    moved = {}
    for rates in ({}, {"adapter": 1e-9}):
        config = trained_config(tmp_path / str(len(rates)), base)
        stage = config.train.stages["localization"]
        stage.max_steps, stage.learning_rates, stage.weight_decay = 2, rates, 0.0
        train_system(config, "stage 2 only", None, nothing)
        folder = Run(config).model_dir("stage 2 only")
        weights = load_file(folder / "merged" / "model.safetensors")
        before = load_file(base / "model.safetensors")
        moved[len(rates)] = {
            part: max(float((weights[n] - before[n]).abs().max()) for n in before if word in n)
            for part, word in (("adapter", "multi_modal_projector"), ("llm", "language_model"))
        }
    assert moved[0]["adapter"] > 1e-3
    assert moved[1]["adapter"] < 1e-7
    assert moved[1]["llm"] > 1e-4
