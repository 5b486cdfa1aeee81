"""Judge whether an answer in free text is right.

By kind of question:

- **generation**: right if the answer is the expected text in normal form, or if the gazetteer's names that occur in it
  are exactly the expected one. Naming two different streets is wrong even if one of them is right; a name inside a longer
  name (the district *Harbour* in *Harbour Street*) does not count. A question for the whole address needs both names.
- **judgment**: the first word that is *yes* or *no* decides; an answer with neither is wrong.
- **choice**: right if exactly one of the options is named and it is the expected one; an answer that names none may give
  the option's letter (`B`, `(b)`, `Option B.`, `The answer is B`), counted in the order of the options.

Names are compared in the normal form of `normalize_name`: case, punctuation and abbreviations such as *St* for *Street* make no
difference. A variant of a name (another language, an old or short form in the gazetteer) counts as the name.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from addressvlm.gazetteer.name_matcher import NameFinder, normalize_name

_YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
_LETTER = re.compile(r"(?:(?:the )?(?:correct )?(?:answer|option|choice)(?: is)?:? ?)?\(?([a-z])\)?[.:]?", re.IGNORECASE)


class Judge:
    """Judges answers by the names of all streets and districts."""

    def __init__(
        self, streets: Iterable[str], districts: Iterable[str], variants: Mapping[str, Iterable[str]] | None = None
    ) -> None:
        """`variants`: name of a street or district -> other names it goes by, which count as the name."""
        streets, districts = list(streets), list(districts)
        self._finder = NameFinder([*streets, *districts], variants)
        self._names = {
            "street": {normalize_name(name) for name in streets},
            "district": {normalize_name(name) for name in districts},
        }
        self._all_names = self._names["street"] | self._names["district"]

    def correct(
        self, level: str, kind: str, expected: str, answer: str, options: Sequence[str] | None = None, street: str = ""
    ) -> bool:
        """Whether `answer` is right.

        Args:
            level: district, street or address.
            kind: generation, judgment or choice.
            expected: the right answer as the dataset has it; of an address "<street>, <district>".
            answer: as the model wrote it.
            options: the names offered by a choice.
            street: of an address, the street's name, which may contain a comma.
        """
        if kind == "judgment":
            return yes_no(answer) == yes_no(expected)
        if kind == "choice":
            return self._chosen_option(answer, options or []) == normalize_name(expected)
        if normalize_name(answer) == normalize_name(expected):
            return True
        names = self._finder.find(answer)
        if level != "address":
            return names & self._names[level] == {normalize_name(expected)}
        street = street or expected.rpartition(",")[0]
        parts = {"street": street, "district": expected[len(street) :].lstrip(", ")}
        return all(names & self._names[part] == {normalize_name(name)} for part, name in parts.items())

    def _chosen_option(self, answer: str, options: Sequence[str]) -> str | None:
        """Normal form of the option that the answer picks, None if it picks none or several."""
        options_normal = [normalize_name(option) for option in options]
        if normalize_name(answer) in options_normal:
            return normalize_name(answer)
        finder = self._finder if self._all_names.issuperset(options_normal) else NameFinder([*self._all_names, *options])
        names = finder.find(answer) & set(options_normal)
        if names:
            return names.pop() if len(names) == 1 else None
        letter = _LETTER.fullmatch(answer.strip())
        index = ord(letter[1].lower()) - ord("a") if letter else len(options)
        return options_normal[index] if index < len(options) else None


def yes_no(answer: str) -> str | None:
    """`yes` or `no`, whichever word comes first; None if neither does."""
    match = _YES_NO.search(answer)
    return match[1].lower() if match else None
