"""The loss of a batch equals that of its rows alone, and that of transformers

python -m pytest -q tests/training/test_loss.py
"""

from pathlib import Path

import pytest
import torch
from PIL import Image

from addressvlm.models import load_model
from addressvlm.training.collator import Collator, Sample
from addressvlm.training.loss import answer_loss


@pytest.fixture(scope="module")
def loaded(base: Path) -> tuple:
    return load_model(str(base))


def sample(*rounds: tuple[str, str]) -> Sample:
    return Sample(Image.new("RGB", (40, 30), "red"), list(rounds))


def test_loss_equals_that_of_the_rows_alone(loaded: tuple) -> None:
    model, processor = loaded
    collate = Collator(processor)
    samples = [sample(("Which street is this?", "Mill Street")), sample(("Is it?", "Yes"), ("Which?", "Oak Avenue"))]
    together, count = answer_loss(model, collate(samples))
    alone = [answer_loss(model, collate([s])) for s in samples]
    assert count == sum(n for _, n in alone)
    torch.testing.assert_close(together, sum(loss for loss, _ in alone), rtol=1e-5, atol=1e-5)


def test_loss_equals_that_of_transformers(loaded: tuple) -> None:
    model, processor = loaded
    batch = Collator(processor)([sample(("Which street is this?", "Mill Street"))])
    total, count = answer_loss(model, batch)
    torch.testing.assert_close(total / count, model(**batch).loss, rtol=1e-5, atol=1e-5)
