import random
from pathlib import Path

import pytest

from addressvlm.storage import tables
from addressvlm.tools.label_diversity import distinct_n, main
from tests.support.label_texts import random_facts


def test_distinct() -> None:
    assert distinct_n(["a b c", "a b d"], 1) == 4 / 6
    assert distinct_n(["a b c", "a b d"], 2) == 3 / 4
    assert distinct_n([""], 2) == 0


def test_variety_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    rows = [{"id": str(i), "facts": random_facts(rng).to_json()} for i in range(20)]
    tables.write_table(tmp_path, "train", rows, tables.GRAFTS)
    monkeypatch.setattr("sys.argv", ["variety", str(tmp_path)])
    main()
    assert "20 labels" in capsys.readouterr().out
