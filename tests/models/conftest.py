"""Fixtures of the tests of training and models"""

from pathlib import Path

import pytest

from tests.support.tiny import tiny_llava


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA of a few thousand weights."""
    return tiny_llava(tmp_path_factory.mktemp("tiny"))
