"""Prompts of the labelers (paper 001, Sec. 3.2): Markdown files whose hint is the true address.

A file has front matter, then the sections `questions` (for the trained model), `system`, `user` and `again` (for a retry).
Its version is a digest of its content, so that answers to an edited prompt are never confused.
"""

import hashlib
import re
import string
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from addressvlm.config.labels import LabelsConfig
from addressvlm.errors import InputError
from addressvlm.labels.facts import Facts
from addressvlm.labels.lexicon import join_words

FOLDER = Path(__file__).with_name("prompts")
SLOTS = {"street", "district", "city", "question", "facts"}
HINT = {"street", "district"}  # without these the model would have to guess the address
SECTIONS = {"questions", "system", "user", "again"}
EXAMPLE = {"example", "answer"}  # optional sections: a worked example before the question; small models need one
VERSION_DIGITS = 12


class _FrontMatter(BaseModel):
    """The front matter of a prompt file."""

    model_config = ConfigDict(extra="forbid")

    name: str
    shows: Literal["graft", "photo"]
    image: Literal["needed", "optional"]
    claims: Literal["free", "verified"]
    concludes: Literal["address", "district"] = "address"
    again: Literal["reply", "afresh"] = "reply"
    slots: set[str]


@dataclass(frozen=True)
class Prompt:
    """A prompt file as read."""

    name: str
    version: str  # digest of the content
    shows: str  # graft: the photo in the corner of its tile; photo: the street view alone
    image_needed: bool  # a text-only model can't use it
    hide_rejected: bool  # a retry shows only the problems of a rejected text: small models repeat what they see
    verified: bool  # the claims of a label must be among the facts
    questions: tuple[str, ...]  # for the trained model, one drawn per row
    system: str
    user: str  # with slots, see SLOTS
    again: str  # with the slot {problems}
    concludes: str = "address"  # or district: then a label names no street
    example: str = ""  # a user message and its answer; both empty without an example
    answer: str = ""

    def user_message(self, facts: Facts, question: str) -> str:
        """The user message for one image, with the hint."""
        return self.user.format(
            street=facts.street,
            district=facts.district,
            city=facts.city or "not named",
            question=question,
            facts=fact_notes(facts),
        )

    def opening_messages(self) -> list[dict[str, Any]]:
        """The system message, and the example if there is one."""
        example = [{"role": "user", "content": self.example}, {"role": "assistant", "content": self.answer}]
        return [{"role": "system", "content": self.system}, *(example if self.example else [])]

    def retry_message(self, problems: list[str]) -> str:
        """The user message after a rejected text."""
        return self.again.format(problems="; ".join(problems))


def configured_prompt(config: LabelsConfig) -> Prompt:
    """The prompt that the settings name."""
    prompt = load_prompt(config.prompt)
    if prompt.image_needed and not config.send_image and config.labeler != "template":
        raise InputError(
            f"the prompt '{prompt.name}' needs the image and labels.send_image is false: set it to true, or labels.prompt to "
            "grounded."
        )
    if config.language != "en" and (prompt.verified or not config.send_image):
        raise InputError(
            f"labels.language is {config.language} and labels of '{prompt.name}' are verified in English only: set "
            "labels.language to en, or labels.prompt to alignment with images."
        )
    if config.language != "en" and config.labeler == "template":
        raise InputError(
            f"labels.language is {config.language} and templates are in English: set it to en, or another labeler."
        )
    return prompt


@cache
def load_prompt(source: str = "alignment") -> Prompt:
    """Read a shipped prompt by its name (`alignment`, `grounded`, `grounded_small`, `reasoning`), or any file by its path."""
    path = Path(source) if source.endswith(".md") else FOLDER / f"{source}.md"
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        names = ", ".join(sorted(p.stem for p in FOLDER.glob("*.md")))
        raise InputError(f"no prompt '{source}' (labels.prompt): give the path of a .md file, or one of {names}.") from None
    _, front, body = content.split("---\n", 2) if content.startswith("---\n") and content.count("---\n") > 1 else ("", "", "")
    head = _parse_front_matter(front, path)
    _, *parts = re.split(r"^# (\w+)\n", body, flags=re.MULTILINE)
    texts = {name: text.strip() for name, text in zip(parts[::2], parts[1::2], strict=True)}
    if texts.keys() not in (SECTIONS, SECTIONS | EXAMPLE) or not all(texts.values()):
        raise InputError(
            f"prompt {path}: it must have the sections # {', # '.join(sorted(SECTIONS))}; # example and # answer go together."
        )
    _check_slots(texts, head, path)
    questions = tuple(line.removeprefix("- ").strip() for line in texts.pop("questions").splitlines() if line.strip())
    return Prompt(
        name=head.name,
        version=hashlib.sha256(content.encode()).hexdigest()[:VERSION_DIGITS],
        shows=head.shows,
        image_needed=head.image == "needed",
        hide_rejected=head.again == "afresh",
        verified=head.claims == "verified",
        concludes=head.concludes,
        questions=questions,
        **texts,
    )


def _parse_front_matter(front: str, path: Path) -> _FrontMatter:
    try:
        return _FrontMatter.model_validate(yaml.safe_load(front) or {})
    except yaml.YAMLError as error:
        raise InputError(f"prompt {path}: its front matter is not YAML: {' '.join(str(error).split())}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"prompt {path}: its front matter between two lines --- must give name, shows, image, claims and slots "
            f"({'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']})."
        ) from None


def _check_slots(texts: dict[str, str], head: _FrontMatter, path: Path) -> None:
    """Check that the hint is there and that every slot can be filled."""
    try:
        used = {
            part: {slot for _, slot, _, _ in string.Formatter().parse(texts[part]) if slot is not None}
            for part in ("user", "again")
        }
    except ValueError as error:
        raise InputError(f"prompt {path}: {error}; a brace that is no slot is written twice.") from None
    if missing := (HINT if head.concludes == "address" else {"district"}) - used["user"]:
        raise InputError(f"prompt {path} lacks the hint: write {{{sorted(missing)[0]}}} into its section # user.")
    if unknown := (used["user"] | head.slots) - SLOTS:
        raise InputError(
            f"prompt {path} has the unknown slot {{{sorted(unknown)[0]}}}: the slots are {', '.join(sorted(SLOTS))}."
        )
    if wrong := used["user"] ^ head.slots:
        raise InputError(f"prompt {path}: `slots` and the slots of its section # user differ in {', '.join(sorted(wrong))}.")
    if used["again"] != {"problems"}:
        raise InputError(f"prompt {path}: the section # again must have the one slot {{problems}}, for the reason.")


def fact_notes(facts: Facts) -> str:
    """Facts as plain sentences, one per line, in the order of a label; unknown facts are left out."""
    lines = []
    if facts.photo_colours:
        lines.append(f"The main colours of the photo are {join_words(facts.photo_colours)}.")
    if facts.facing:
        view = {"along": ", along the street", "across": ", across the street", "oblique": ", at an angle to the street"}
        lines.append(f"The camera faces {facts.facing}{view.get(facts.view or '', '')}.")
    if facts.sky:
        lines.append(f"The sky is {facts.sky}.")
    if facts.greenery:
        lines.append(f"There is {facts.greenery} greenery.")
    if facts.names:
        lines.append(f"The map bears the name{'s' if len(facts.names) > 1 else ''} {join_words(facts.names)}.")
    if facts.direction:
        lines.append(f"{facts.on_map} runs {facts.direction} at the centre of the map.")
    if facts.tile_colours:
        lines.append(f"From above, the place is mainly {join_words(facts.tile_colours)}.")
    if facts.cross_street:
        distance = facts.cross_distance_m
        where = f"{distance} metres to the {facts.cross_direction}" if distance else "right at the camera"
        lines.append(f"{facts.cross_street} meets {facts.on_map} {where}.")
    return "\n".join(lines) or "Nothing was measured."
