"""The alignment prompt (paper 001, Sec. 3.2), kept as data in prompt.md: the true address is its hint."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from addressvlm.labels.facts import Facts

FILE = Path(__file__).with_name("prompt.md")


@dataclass(frozen=True)
class Prompt:
    """The texts of the prompt; slots {street} {district} {facts} {question} in `user`, {problems} in `again`."""

    version: str
    system: str
    user: str
    again: str

    def ask(self, facts: Facts, question: str) -> str:
        """The user's message about one grafted image."""
        return self.user.format(street=facts.street, district=facts.district, facts=notes(facts), question=question)

    def ask_again(self, problems: list[str]) -> str:
        """The message after a label that failed its checks."""
        return self.again.format(problems="; ".join(problems))


@cache
def load_prompt(path: Path = FILE) -> Prompt:
    """Read a prompt file: a `version:` line, then sections `# system`, `# user`, `# again`."""
    head, *sections = re.split(r"^# (\w+)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    texts = {name: text.strip() for name, text in zip(sections[::2], sections[1::2], strict=True)}
    return Prompt(version=head.split("version:")[1].strip(), **texts)


def notes(facts: Facts) -> str:
    """Facts as a list for the prompt, one line each; what is not known is left out."""
    lines = []
    if facts.names:
        lines.append(f"names written on the map: {', '.join(facts.names)}")
    if facts.direction:
        lines.append(f"{facts.street} runs {facts.direction} at the centre")
    if facts.facing:
        view = f", {facts.view} the street" if facts.view in ("along", "across") else ""
        lines.append(f"the camera faces {facts.facing}{view}")
    if facts.cross_street:
        lines.append(f"{facts.cross_street} meets it {facts.cross_distance_m} m to the {facts.cross_direction}")
    if facts.photo_colours:
        lines.append(f"main colours of the photo: {', '.join(facts.photo_colours)}")
    if facts.tile_colours:
        lines.append(f"main colours around the place from above: {', '.join(facts.tile_colours)}")
    return "\n".join(f"- {line}" for line in lines) or "- none"
