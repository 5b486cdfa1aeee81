"""No text of a caller takes time that grows faster than its length. More texts: benchmarks/slow_inputs.py."""

import re

import pytest
from hypothesis import example, given, settings

from addressvlm.answers.chat_model import any_of
from addressvlm.answers.question_parser import MAX_LENGTH, MAX_OPTIONS, parse_question
from addressvlm.gazetteer import name_matcher
from tests.support.slow_inputs import Recipe, city, cpu_s, recipes, targets

pytestmark = pytest.mark.xdist_group("serve")
LENGTH = 4000
GAZETTEER = city()
TARGETS = targets(GAZETTEER)


def grows_too_fast(name: str, recipe: Recipe) -> bool:
    """Whether a text of four times the length takes more than ten times the time; what takes no time is no matter."""
    short, long = (min(cpu_s(TARGETS[name], recipe.text(n)) for _ in range(2)) for n in (LENGTH, 4 * LENGTH))
    return long > 10 * max(short, 0.01)


@pytest.mark.parametrize("name", TARGETS)
@given(recipes())
@settings(max_examples=8, deadline=None, derandomize=True)
@example(Recipe("", "options: ", ""))  # a pattern that tried every split of it
@example(Recipe("choose from ", " ", "["))
@example(Recipe("is this ", "Mill Street ", "?"))  # every pair of mentions was compared, and each removal was a recursion
@example(Recipe("options: ", "Mill Street; ", "a"))
@example(Recipe("a", "\u0315\u0300", ""))  # combining characters, which Python's normalization sorts by insertion
@example(Recipe("select ", "select ", ""))
@example(Recipe("data:", ";a=", ""))
def test_time_grows_with_the_length(name: str, recipe: Recipe) -> None:
    assert not (grows_too_fast(name, recipe) and grows_too_fast(name, recipe)), name


def test_long_texts_are_not_remembered() -> None:
    forms = (name_matcher.normalize_name, name_matcher.unaccented_name)
    cells = [cell.cell_contents for form in forms for cell in form.__closure__]
    caches = [cell for cell in cells if hasattr(cell, "cache_info")]
    names = [cache for cache in caches if cache.cache_info().maxsize > 4]
    assert (len(caches), len(names)) == (4, 2)
    before = [cache.cache_info().currsize for cache in names]
    for number in range(50):
        GAZETTEER.find_street(f"Is this {number} {'x' * 100}?")
    assert [cache.cache_info().currsize for cache in names] == before


def test_special_tokens_are_found_in_one_look_however_many_there_are() -> None:
    tokens = {
        *(f"<loc{number:04}>" for number in range(1024)),
        *(f"<unused{number}>" for number in range(99)),
        "<image>",
        "</s>",
        "<s>",
    }
    pattern = re.compile(any_of(tokens))
    assert pattern.split("a<loc0007>b<unused9><unused98>c</s><loc1024><unused>") == ["a", "b", "", "c", "<loc1024><unused>"]
    assert re.compile(any_of(["ab", "abc", "a|", "abd"])).findall("abcababda|abx") == ["abc", "ab", "abd", "a|", "ab"]
    for unit in ("<", "<loc", "<loc000", "<unused9", "<imag"):
        recipe = Recipe("", unit, "")
        cpu_s(pattern.split, recipe.text(LENGTH))
        short, long = (min(cpu_s(pattern.split, recipe.text(n)) for _ in range(2)) for n in (LENGTH, 4 * LENGTH))
        assert long <= 10 * max(short, 0.01)


def test_very_long_questions_and_lists_of_options_are_not_about_the_address() -> None:
    few = "; ".join(["Mill Street"] * MAX_OPTIONS)
    assert parse_question(f"Options: {few}.", GAZETTEER)
    assert parse_question(f"Options: {few}; Mill Street.", GAZETTEER) is None
    question = "Is this Mill Street?"
    assert parse_question(question.ljust(MAX_LENGTH), GAZETTEER)
    assert parse_question(question.ljust(MAX_LENGTH + 1), GAZETTEER) is None
