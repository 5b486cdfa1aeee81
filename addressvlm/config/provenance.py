"""Where a setting came from, and which key was meant: the sentences of configuration errors."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from addressvlm.config.base import Section

# Words of other tools that don't resemble the key.
OTHER_WORDS = {
    "nproc": "workers", "replicas": "workers", "world_size": "workers", "devices": "gpus_per_worker", "num_gpus":
    "gpus_per_worker", "output": "storage", "output_dir": "storage", "csv": "manifest", "table": "manifest", "osm": "streets",
    "map": "streets", "satellite": "imagery", "bf16": "precision", "fp16": "precision", "amp": "precision", "report_to":
    "loggers", "wandb": "loggers", "trackers": "loggers", "fsdp": "strategy", "deepspeed": "strategy", "eval_steps":
    "validate_every", "save_steps": "checkpoint_every", "endpoint_url": "base_url", "api_base": "base_url", "budget":
    "budget_usd", "r": "rank", "lora_r": "rank", "lora_alpha": "alpha", "freeze": "parts", "gradient_checkpointing":
    "checkpoint_activations",
}  # fmt: skip
SIMILAR = 0.6  # least resemblance of a key that is suggested


@dataclass(frozen=True)
class Source:
    """Settings of one origin: a file, an environment variable, or an argument of the command line.

    Attributes:
        name: as errors name it.
        tree: its settings alone.
    """

    name: str
    tree: dict[str, Any]

    def depth(self, location: Sequence[Any]) -> int:
        """How much of a path it sets."""
        node: Any = self.tree
        for depth, part in enumerate(location):
            if (isinstance(node, dict) and part in node) or (
                isinstance(node, list) and isinstance(part, int) and part < len(node)
            ):
                node = node[part]
            elif not isinstance(part, str) or not isinstance(node, dict) or part != node.get("kind"):  # a union's tag
                return depth
        return len(location)

    def key_names(self) -> set[str]:
        """The names of all its keys."""
        keys, nodes = set[str](), [self.tree]
        while nodes:
            node = nodes.pop()
            keys |= set(map(str, node))
            nodes += [value for value in node.values() if isinstance(value, dict)]
        return keys


def error_sentences(errors: Sequence[Any], root: type[Section], where: str, sources: Sequence[Source]) -> str:
    """pydantic's errors as text, each with the source it came from.

    Args:
        root: the class of the whole tree.
        where: names what no source sets.
        sources: the later override the earlier.
    """
    sentences: list[str] = []
    before = ""
    for error in errors:
        origin = _origin(error, sources) or where
        sentences.append(_problem(error, root) if origin == before else f"{origin}: {_problem(error, root)}")
        before = origin
    text = "; ".join(sentences)
    return text if text.endswith("?") else f"{text}."


def _origin(error: Any, sources: Sequence[Source]) -> str:
    """The last source that sets what an error is about; of settings that don't fit together, one that the error names."""
    location = error["loc"]
    deepest = max((source.depth(location) for source in sources), default=0)
    if not deepest and location:
        return ""
    candidates = [source for source in reversed(sources) if source.depth(location) == deepest]
    if error["type"] == "value_error":
        named = [source for source in candidates if any(key in error["msg"] for key in source.key_names())]
        files = [source for source in candidates if not source.name.startswith(("--set ", "ADDRESSVLM_"))]
        candidates = named or files or candidates
    return candidates[0].name if candidates else ""


def _problem(error: Any, root: type[Section]) -> str:
    """A pydantic error as text; for an unknown key with the most similar one."""
    location = ".".join(str(part) for part in error["loc"]) or "the configuration"
    if error["type"] == "extra_forbidden":
        *path, word = error["loc"]
        known = sorted({key for section in _sections_at(root, path) for key in section.model_fields})
        if near := nearest(str(word), known):
            return f"unknown key '{location}', did you mean '{near}'?"
        everywhere = {".".join(keys): keys[-1] for keys in _all_keys(root)}
        if near := nearest(str(word), set(everywhere.values())):
            paths = [key for key, last in everywhere.items() if last == near]
            closest = max(paths, key=lambda key: (_shared_depth(key.split("."), path), -len(key)))
            return f"unknown key '{location}', did you mean '{closest}'?"
        return f"unknown key '{location}', known are {', '.join(known)}"
    message = error["msg"].removeprefix("Value error, ")
    return f"'{location}' is {error['input']!r}: {message}" if error["type"] != "value_error" else f"'{location}': {message}"


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name that is most like a word: by spelling, as its initials or short forms of its parts, or in other tools' words."""
    scored = sorted(((_likeness(word.lower(), name), name) for name in sorted(names)), key=lambda pair: -pair[0])
    return scored[0][1] if scored and scored[0][0] >= SIMILAR else None


def _likeness(word: str, name: str) -> float:
    """From 0 to 1."""
    if OTHER_WORDS.get(word) == name:
        return 1.0
    if len(name) > 4 and any(name[:at] + name[at + 1 :] == word for at in range(len(name))):  # one letter too few
        return 0.97
    parts, beginnings = name.split("_"), word.split("_")
    if len(parts) > 1 and word == "".join(part[:1] for part in parts):
        return 0.95
    if len(word) > 3 and len(beginnings) <= len(parts) and all(map(str.startswith, parts, beginnings)):
        return 0.9
    return difflib.SequenceMatcher(None, word, name).ratio()


def _shared_depth(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many first parts two paths share."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _members(annotation: Any) -> Iterator[Any]:
    """The classes, dicts and lists that an annotation may be: without Optional, Union and Annotated."""
    if get_origin(annotation) in (dict, list) or isinstance(annotation, type):
        yield annotation
    elif get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    else:
        for argument in get_args(annotation):
            yield from _members(argument)


def _sections_at(root: type[Section], path: Sequence[Any]) -> list[type[Section]]:
    """The sections that a path may lead to."""
    current: list[Any] = [root]
    for part in path:
        below: list[Any] = []
        for member in current:
            if get_origin(member) in (dict, list):
                below += _members(get_args(member)[-1])
            elif issubclass(member, Section) and part in member.model_fields:
                below += _members(member.model_fields[part].annotation)
            elif issubclass(member, Section) and "kind" in member.model_fields:
                kind = member.model_fields["kind"].annotation
                below += [member] if get_origin(kind) is Literal and part in get_args(kind) else []
        current = below
    return [member for member in current if isinstance(member, type) and issubclass(member, Section)]


def _all_keys(annotation: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all keys; `<name>` and `<number>` stand for the keys of dicts and lists."""
    for member in _members(annotation):
        if get_origin(member) is not None:
            step = "<name>" if get_origin(member) is dict else "<number>"
            yield from _all_keys(get_args(member)[-1], (*path, step))
        elif issubclass(member, Section):
            for key, field in member.model_fields.items():
                yield (*path, key)
                yield from _all_keys(field.annotation, (*path, key))
