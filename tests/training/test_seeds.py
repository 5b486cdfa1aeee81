"""What a seed decides in training"""

from pathlib import Path

import pytest
import torch

from addressvlm.training.stages import build_stages
from tests.support.tiny import tiny_llava
from tests.support.training_tables import trained_config


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("tiny"))


def test_large_seeds_are_taken(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path, base)
    config.seed = 10**6
    stage = build_stages(config, config.train.systems[1])[0]
    seeds = {stage.dropout_seed(step, rank) for step in range(3) for rank in range(2)}
    assert len(seeds) == 6
    for seed in seeds:
        torch.manual_seed(seed)


def test_a_seed_of_training_leaves_the_split_alone(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path, base)
    own = trained_config(tmp_path, base, seed=7)
    before, after = (build_stages(one, one.train.systems[1])[0] for one in (config, own))
    assert (own.seed, own.training_seed, config.training_seed) == (0, 7, 0)
    assert after.schedule.seed != before.schedule.seed
    assert after.schedule.indices(0) != before.schedule.indices(0)
