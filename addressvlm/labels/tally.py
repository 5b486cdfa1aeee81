"""What asking and labelling came to."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from addressvlm.config_labels import LabelsConfig
from addressvlm.labels.ledger import Answer, Ledger
from addressvlm.labels.prompt import prompt_of
from addressvlm.labels.writer import writer

KINDS = ("source ", "problem ")


@dataclass
class Tally:
    """Counts of one job.

    Attributes:
        rows: that were asked about and have their label, of `total`.
        asked: requests sent, tries again among them.
        refused, empty: answers without a text.
        failed: rows that the endpoint never answered for.
        unreadable: rows whose image can't be decoded.
        again: tries again by reason: an HTTP status, time-out, connection, no JSON.
        seconds: since the first row was read.
    """

    total: int = 0
    rows: int = 0
    asked: int = 0
    answered: int = 0
    refused: int = 0
    empty: int = 0
    failed: int = 0
    unreadable: int = 0
    again: Counter[str] = field(default_factory=Counter)
    tokens_in: int = 0
    tokens_out: int = 0
    usd: float = 0.0
    seconds: float = 0.0

    def count(self, answer: Answer) -> None:
        """Add one answer."""
        self.answered += 1
        self.refused += answer.refusal is not None
        self.empty += answer.refusal is None and not answer.text
        self.tokens_in += answer.tokens_in
        self.tokens_out += answer.tokens_out
        self.usd += answer.usd

    def line(self) -> str:
        """Progress in a line: rows, tokens, money, time left."""
        parts = [f"{self.rows:,}/{self.total:,} rows asked about", f"{self.tokens_in + self.tokens_out:,} tokens"]
        if self.usd:
            parts.append(f"{self.usd:,.4g} US dollars")
        if self.again:
            parts.append(f"{self.again.total():,} tries again")
        if 0 < self.rows < self.total:
            parts.append(f"{self.seconds / self.rows * (self.total - self.rows):,.0f} s left")
        return f"label: {', '.join(parts)}"

    def to_dict(self) -> dict[str, Any]:
        """The counts by name, for labels.json."""
        return {**asdict(self), "again": dict(sorted(self.again.items()))}


def report_of(config: LabelsConfig, counts: Counter[str], tally: Mapping[str, Any], ledger: Ledger | None) -> dict[str, Any]:
    """What labels.json holds: who wrote how many labels, why texts were not taken, what was asked and what it cost.

    Args:
        counts: `source <who>` and `problem <kind>`, as from `label_batch`.
        tally: of the job that asked last, empty if none did.
    """
    prompt = prompt_of(config)
    by = {kind: {key.removeprefix(kind): n for key, n in counts.most_common() if key.startswith(kind)} for kind in KINDS}
    return {
        "prompt": prompt.name,
        "version": prompt.version,
        "writer": "template" if config.labeler == "template" else writer(config),
        "rows": sum(by["source "].values()),
        "sources": by["source "],
        "problems": by["problem "],  # over all asks; a text may have several
        "last_job": dict(tally),
        "run": {"tokens": ledger.tokens, "usd": round(ledger.usd, 6)} if ledger else {},
    }


def summary(report: Mapping[str, Any]) -> str:
    """What a report of `report_of` holds, in a few words."""
    said = [f"{report['rows']:,} labels: {_list(report['sources'])}"]
    if report["problems"]:
        said.append(f"texts not taken for: {_list(report['problems'])}")
    if job := report["last_job"]:
        again = f" (tried again: {_list(job['again'])})" if job["again"] else ""
        said.append(f"{job['asked']:,} requests{again}, {job['refused']:,} refused, {job['empty']:,} empty answers")
    if run := report["run"]:
        said.append(f"the run has cost {run['tokens']:,} tokens, {run['usd']:.4g} US dollars")
    return "; ".join(said)


def _list(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {what}" for what, n in counts.items())
