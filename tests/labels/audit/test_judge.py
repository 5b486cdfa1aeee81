import json
from pathlib import Path

from addressvlm.labels.audit.__main__ import main
from addressvlm.labels.audit.judge import parse_levels
from addressvlm.labels.audit.sheet import Rating, read_ratings
from tests.support.audit_sheets import sheet
from tests.support.openai_endpoint import Endpoint, says


def test_a_judges_lines() -> None:
    assert parse_levels("Truth: right\n**reason**: partly\n- names = WRONG.") == {"truth": 2, "reason": 1, "names": 0}
    assert parse_levels("The text is true and right.") == {}
    assert parse_levels("truth: wrong\ntruth: right") == {"truth": 0}


def test_a_model_judges_the_sheet_and_is_paid_once(tmp_path: Path) -> None:
    table, items = sheet(tmp_path, template=4)
    good, bad = says("truth: right\nreason: partly\nnames: right"), says("I think it is fine.")
    broken = items[0]["label"]
    with Endpoint(lambda number, body: bad if broken in json.dumps(body) else good).running() as endpoint:
        command = ["judge", "--sheet", str(table), "--set", f"labels.base_url={endpoint.url}", "--set", "labels.model=m"]
        command += ["--set", "labels.max_attempts=2", "--out", str(tmp_path / "judge.csv")]
        main(command)
        requests = len(endpoint.requests)
        main(command)
    assert requests == len(endpoint.requests) == 3 + 2  # the broken one is asked twice, the second run asks nothing
    user = endpoint.requests[0]["messages"][1]["content"]
    assert user[0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert "King Street meets Mill Street" in user[1]["text"]
    ratings = read_ratings([tmp_path / "judge.csv"], items)
    assert {r.item for r in ratings} == {item["item"] for item in items[1:]}
    assert ratings[0] == Rating(ratings[0].item, "judge openai:m", {"truth": 2, "reason": 1, "names": 2})
