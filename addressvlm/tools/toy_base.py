"""Train the toy base model from scratch: a small FastVLM (ResNet tower, two-layer adapter, llama) that reads and sees.

    python -m addressvlm.tools.toy_base_data /tmp/toy-data --cities 3 --first-seed 3000      # never trained on: for the gates
    python -m addressvlm.tools.toy_base_data /tmp/toy-data --cities 48 --first-seed 2001
    python -m addressvlm.tools.toy_base /tmp/toy-data /tmp/base-run
    python -m addressvlm.tools.toy_base /tmp/toy-data /tmp/base-run --check     # measure run/model and write its card
    cp /tmp/base-run/model/* addressvlm/demo/base/

The demo's tiles are drawn as those of the lessons (tiles.pixels and font_px in presets/demo.yaml). About an hour and a half on
two cores that do nothing else.

First the tower alone learns which words and traits an image shows; then the language model learns to answer from a tower at
rest, since the gradients of an untrained one would spoil it; then both. Rerun it to resume; a run is done after `--steps`.
`log.txt` has the gates: how many own names the whole model reads on tiles of cities it never saw, and how many traits it sees
from the street and from above.
"""

import argparse
import os
import random
import time
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlamaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ResNetConfig,
)

from addressvlm.demo.world import DISTRICTS, KINDS, WORDS
from addressvlm.grafting import graft
from addressvlm.models.loading import enable_packing, load_model, to_device
from addressvlm.tools import toy_base_data as data
from addressvlm.training.collator import IGNORE_INDEX, Collator, Sample, messages
from addressvlm.training.loss import token_losses

PAD, USER, ASSISTANT, END, IMAGE = "<pad>", "<|user|>", "<|assistant|>", "<|end|>", "<image>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PATCH = 16  # pixels of an image a token: a photo grafted with delta 0.5 ends on a patch's edge
VOCABULARY = 1024
TOKENIZER_LESSONS = 4000
TRAIT_KINDS = ("paving", "colour of the fronts", "trees", "spacing of trees", "floors", "spacing of windows")  # of data.TRAITS
TRAIT_WORDS = [trait.split()[0] for kind in data.TRAITS for trait in kind]  # "gravel" of "gravel road"
NAME_WORDS = [*WORDS, *KINDS]
FIRST_UNSEEN = 3000  # seeds of cities that are never trained on
TOWER_SHARE = 0.4  # share of the steps in which the tower learns alone
LANGUAGE_SHARE = 0.25  # share of the steps in which, after that, the language model learns from a tower at rest
DECAY_SHARE = 0.25  # share of the steps at whose end the learning rate falls to zero
TOWER_WEIGHT = 0.3  # of the tower's own loss while the whole model learns
WARMUP = 100  # steps at the start of each stage


def train_tokenizer(texts: Iterable[str], vocabulary: int, words_anywhere: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `vocabulary` entries.

    With `words_anywhere` a text begins with a space, so that a word at the start of an answer is the same token as within a
    sentence.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=words_anywhere)
    decode = decoders.ByteLevel()
    tokenizer.decoder = decoders.Sequence([decode, decoders.Strip(" ", 1, 0)]) if words_anywhere else decode
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, USER, ASSISTANT, END, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, extra_special_tokens=[USER, ASSISTANT, IMAGE]
    )


def base_tokenizer(cities: list[data.City]) -> PreTrainedTokenizerFast:
    """The base's tokenizer: every word of a street's or district's name or of a trait is one token, wherever it stands."""
    rng = random.Random(0)
    lessons = [data.draw_lesson(cities, rng) for _ in range(TOKENIZER_LESSONS)]
    texts = [f" {text}" for lesson in lessons for text in chain(*lesson.rounds)]
    names = [f" {word}" for word in (*NAME_WORDS, *DISTRICTS, *TRAIT_WORDS)]
    return train_tokenizer(texts + names * 400, VOCABULARY, words_anywhere=True)


def build(tokenizer: PreTrainedTokenizerFast) -> tuple[FastVlmForConditionalGeneration, LlavaProcessor]:
    """A randomly initialized model of 3.2 million parameters, and its processor."""
    text = LlamaConfig(
        hidden_size=192, intermediate_size=384, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=6,
        vocab_size=len(tokenizer), max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    tower = ResNetConfig(embedding_size=32, hidden_sizes=[32, 96, 192], depths=[2, 2, 2], layer_type="basic", hidden_size=192)
    config = FastVlmConfig(
        vision_config=tower, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids(IMAGE), tie_word_embeddings=True
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"height": data.SIDE, "width": data.SIDE}, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=PATCH,
        num_additional_image_tokens=0,
        vision_feature_select_strategy="full",
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )
    return FastVlmForConditionalGeneration(config), processor


class TowerProbe(nn.Module):
    """What the tower tells without the language model.

    An image token is to be like the tokens of the words it shows, names' and traits', which the language model then only has to
    copy: a logit a word is their product. A word is on the image if any of its tokens shows it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.tensor([token_of(tokenizer, word) for word in (*NAME_WORDS, *TRAIT_WORDS)]))
        self.scale = nn.Parameter(torch.tensor(10.0))

    def word_logits(self, model: FastVlmForConditionalGeneration, features: torch.Tensor) -> torch.Tensor:
        """From features (B, C, H, W) one logit a word of names and traits and image token: (B, H, W, words)."""
        image_tokens = model.model.multi_modal_projector(features.permute(0, 2, 3, 1))
        logits: torch.Tensor = self.scale * image_tokens @ model.get_input_embeddings().weight[self.tokens].T
        return logits

    def forward(
        self, model: FastVlmForConditionalGeneration, features: torch.Tensor, lessons: Sequence[data.Lesson]
    ) -> tuple[torch.Tensor, float]:
        """The loss of these lessons from features (B, C, H, W), and the share of their words with a positive logit."""
        names, traits = self.word_logits(model, features).split([len(NAME_WORDS), len(TRAIT_WORDS)], -1)
        present = torch.tensor([[float(word in lesson.words) for word in NAME_WORDS] for lesson in lessons])
        found = anywhere(names)
        loss = F.binary_cross_entropy_with_logits(found, present, reduction="sum")
        at = [(i, NAME_WORDS.index(word), x, y) for i, lesson in enumerate(lessons) for word, x, y in lesson.places]
        if at:  # the token in the middle of a word that the lesson wrote shows that word
            images, words, x, y = (torch.tensor(column) for column in zip(*at, strict=True))
            row, column = (pixel.div(PATCH).long().clamp(0, features.shape[2] - 1) for pixel in (y, x))
            loss = loss + F.cross_entropy(names[images, row, column], words, reduction="sum")
        recall = ((found > 0) & (present > 0)).sum().item() / max(1.0, present.sum().item())
        return (loss + trait_loss(traits, lessons)) / len(lessons), recall


def trait_loss(logits: torch.Tensor, lessons: Sequence[data.Lesson]) -> torch.Tensor:
    """Cross-entropy of the traits that the images show, from logits (B, H, W, trait words).

    Those of a tile are told by the four tokens around its centre, those of a photo by all.
    """
    first = logits.shape[1] // 2 - 1
    middle = anywhere(logits[:, first : first + 2, first : first + 2])
    pooled = torch.where(torch.tensor([lesson.centre for lesson in lessons])[:, None], middle, anywhere(logits))
    loss = logits.new_zeros(())
    for number, (kind, scores) in enumerate(
        zip(data.TRAITS, pooled.split([len(kind) for kind in data.TRAITS], -1), strict=True)
    ):
        shown = [(i, kind.index(t)) for i, lesson in enumerate(lessons) if (t := lesson.traits[number])]
        if shown:
            rows, right = map(torch.tensor, zip(*shown, strict=True))
            loss = loss + F.cross_entropy(scores[rows], right, reduction="sum")
    return loss


def token_of(tokenizer: PreTrainedTokenizerFast, word: str) -> int:
    """The one token of a word."""
    (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]
    return int(token)


def anywhere(logits: torch.Tensor) -> torch.Tensor:
    """Logits (B, words) that a word is on an image, from those of each image token (B, H, W, words)."""
    return torch.logsumexp(logits.flatten(1, 2), 1) - 6.0


def stage_starts(steps: int) -> tuple[int, int]:
    """The steps at which the language model begins to learn, and at which the tower joins it."""
    return int(TOWER_SHARE * steps), int((TOWER_SHARE + LANGUAGE_SHARE) * steps)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up at the beginning of each stage, a constant rate, then a linear fall to zero."""
    since = step - max(start for start in (0, *stage_starts(steps)) if start <= step)
    return peak * min(1.0, (since + 1) / WARMUP, (steps - step) / (DECAY_SHARE * steps))


def answer_weights(labels: torch.Tensor) -> torch.Tensor:
    """A weight for each answer token of packed labels (1, T): those of an answer of n tokens weigh n ** -0.5 each."""
    answered = labels[0, 1:] != IGNORE_INDEX
    starts = answered & ~torch.cat([torch.tensor([False]), answered[:-1]])
    number = starts.cumsum(0)[answered] - 1
    return number.bincount()[number].float() ** -0.5


class Trainer:
    """The model, its probe and optimizer, at a step of the run."""

    def __init__(self, cities: list[data.City], run: Path, steps: int, batch_size: int, rate: float) -> None:
        torch.manual_seed(0)
        self.cities, self.run, self.steps, self.batch_size, self.rate = cities, run, steps, batch_size, rate
        saved = run / "tokenizer"
        if not saved.is_dir():
            base_tokenizer(cities).save_pretrained(saved)
        self.model, self.processor = build(PreTrainedTokenizerFast.from_pretrained(saved))
        enable_packing(self.model, "on", torch.device("cpu"), "the toy base")
        to_device(self.model, "cpu")
        self.tower = self.model.model.vision_tower
        self.probe = TowerProbe(self.processor.tokenizer)
        self.parameters = [*self.model.parameters(), *self.probe.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=0.05)
        self.collate = Collator(self.processor, isolate_questions=True, packed=True)
        self.step = 0
        if (state := run / "state.pt").is_file():
            self._load(torch.load(state, weights_only=True))

    def _load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.probe.load_state_dict(state["probe"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def save(self) -> None:
        """The state of the run, and the model as a Hugging Face folder of bfloat16 safetensors."""
        parts = {"model": self.model, "probe": self.probe, "optimizer": self.optimizer}
        partial = self.run / "state.partial"
        torch.save({"step": self.step} | {name: part.state_dict() for name, part in parts.items()}, partial)
        partial.replace(self.run / "state.pt")
        floats = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in self.model.state_dict().items()}
        floats.pop("lm_head.weight")  # tied
        self.model.save_pretrained(self.run / "model", state_dict=floats, max_shard_size="4MB")
        self.processor.save_pretrained(self.run / "model")

    def train_step(self) -> tuple[float, float]:
        """One step; returns the loss a token (of the probe, while the tower learns alone) and the probe's recall of words."""
        rng = random.Random(self.step)
        language, both = stage_starts(self.steps)
        shares = data.TOWER_SHARES if self.step < language else data.SHARES
        lessons = [data.draw_lesson(self.cities, rng, shares) for _ in range(self.batch_size)]
        self.model.train()
        if self.step < language:
            features = self.tower(pixels_of(self.processor, lessons)).last_hidden_state
            loss, recall = self.probe(self.model, features, lessons)
            shown = loss.item()
        else:
            learns = self.step >= both  # the gradients of an untrained language model would spoil the tower
            self.tower.requires_grad_(learns).train(learns)
            seen: list[torch.Tensor] = []
            hook = self.tower.register_forward_hook(lambda *call: seen.append(call[2].last_hidden_state))
            batch = self.collate([Sample(lesson.image, lesson.rounds) for lesson in lessons])
            losses = token_losses(self.model, self.collate.finish(batch))
            hook.remove()
            probe_loss, recall = self.probe(self.model, seen[0], lessons)
            loss = (losses * answer_weights(batch["labels"])).sum() / self.batch_size + TOWER_WEIGHT * probe_loss
            shown = losses.mean().item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps, self.rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return shown, recall


def pixels_of(processor: LlavaProcessor, lessons: Sequence[data.Lesson]) -> torch.Tensor:
    """What the tower takes: (B, 3, SIDE, SIDE)."""
    pixels = processor.image_processor([lesson.image for lesson in lessons], return_tensors="pt")["pixel_values"]
    return pixels.to(memory_format=torch.channels_last)


def tower_recall(trainer: Trainer, cities: list[data.City]) -> tuple[float, float]:
    """Shares of the words on unseen tiles that the probe finds, and of those it finds that are there."""
    trainer.model.eval()
    rng, found, right, all_words = random.Random(0), 0, 0, 0
    for city in cities:
        lessons = [data.Lesson(Image.fromarray(city.tiles[i]), [], {w for n in city.about[i]["names"] for w in n.split()[:1]},
                               [None] * len(data.TRAITS), False) for i in rng.sample(range(len(city.about)), 20)]  # fmt: skip
        with torch.no_grad():
            features = trainer.tower(pixels_of(trainer.processor, lessons)).last_hidden_state
            logits = anywhere(trainer.probe.word_logits(trainer.model, features))[:, : len(WORDS)]
        for lesson, row in zip(lessons, logits, strict=True):
            named = {word for word, logit in zip(WORDS, row.tolist(), strict=True) if logit > 0}
            found, right, all_words = found + len(named), right + len(named & lesson.words), all_words + len(lesson.words)
    return right / max(all_words, 1), right / max(found, 1)


@torch.inference_mode()
def gates(model: Any, processor: Any, cities: list[data.City], places: int) -> dict[str, float]:
    """How well the whole model, answering freely, reads and sees in these cities: shares of right answers.

    Returns:
        `own names` on tiles, `own names on grafts`, `traits` from the street, `traits from above`, and of both each kind of
        trait, `traits, floors`.
    """
    rng = random.Random(0)
    chosen = [(city, number) for city in cities for number in rng.sample(range(len(city.about)), places)]
    named = [(c, n) for c, n in chosen if data.own_name(c.about[n], rng)]
    tiles = [Image.fromarray(c.tiles[n]) for c, n in named]
    grafts = [graft(tile, Image.fromarray(c.photos[n, 0]), data.TILES.delta) for tile, (c, n) in zip(tiles, named, strict=True)]
    above = [(c, n) for c, n in chosen if c.about[n]["above"]]
    images = [
        tiles,
        grafts,
        [Image.fromarray(c.photos[n, 0]) for c, n in chosen],
        [Image.fromarray(c.bare[n]) for c, n in above],
    ]
    questions = [data.CENTRE[0], data.CENTRE[0], data.DESCRIBE[0], data.ABOVE[0]]
    own = [[c.about[n]["street"]] for c, n in named]
    truths = [own, own, [c.about[n]["traits"][0] for c, n in chosen], [c.about[n]["above"] for c, n in above]]
    names = ["own names", "own names on grafts", "traits", "traits from above"]
    shares: dict[str, float] = {}
    for name, some, question, truth in zip(names, images, questions, truths, strict=True):
        right: dict[str, list[bool]] = {name: []}
        for answer, expected in zip(answers(model, processor, some, question), truth, strict=True):
            for kind, trait in zip(TRAIT_KINDS, expected, strict=False):
                if trait:
                    found = trait in answer.rstrip(".").split(", ")
                    right[name].append(found)
                    if "traits" in name:
                        right.setdefault(f"{name}, {kind}", []).append(found)
        shares |= {key: sum(found) / max(len(found), 1) for key, found in right.items()}
    return shares


def answers(model: Any, processor: Any, images: list[Image.Image], question: str, batch_size: int = 32) -> list[str]:
    """The model's greedy answers to a question about each image."""
    model.eval()
    prompt = processor.apply_chat_template(messages([(question, "")]), add_generation_prompt=True, tokenize=False)
    texts: list[str] = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        inputs = processor(text=[prompt] * len(batch), images=batch, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        texts += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
---

# The toy base model

A FastVLM (ResNet tower, two-layer adapter, llama) with {millions:.1f} million parameters, trained only on generated cities
other than the demo's, by the commands at the top of `addressvlm/tools/toy_base.py`.

In {cities} cities that it never saw, answering freely, it gets right:

| | |
|---|---:|
{rows}

Names are those of the street at the centre, on tiles and on tiles with a photo in their corner; traits are those that can be
seen, from the street and from above.
"""
GATES = {"own names": 0.95, "own names on grafts": 0.95, "traits": 0.9, "traits from above": 0.9}  # least, to be checked in


def write_card(folder: Path, parameters: int, shares: dict[str, float], cities: int) -> None:
    """Write the model's README.md with what it reads and sees, beside what it is meant to."""
    wanted = {name: f" (at least {share:.0%} wanted)" for name, share in GATES.items()}
    rows = "\n".join(f"| {name} | {share:.1%}{wanted.get(name, '')} |" for name, share in shares.items())
    (folder / "README.md").write_text(CARD.format(millions=parameters / 1e6, cities=cities, rows=rows), encoding="utf-8")


def main() -> None:
    """Train to the last step, or go on from where an earlier run was stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that addressvlm.tools.toy_base_data wrote")
    parser.add_argument("run", type=Path, help="folder of the run: state.pt, log.txt, model/")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--gate-minutes", type=float, default=20)
    parser.add_argument("--check", action="store_true", help="train nothing: measure the model of the run, and write its card")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    args.run.mkdir(parents=True, exist_ok=True)
    folders = sorted(file.parent for file in args.data.glob("*/about.json"))
    cities = [data.City.load(folder) for folder in folders if int(folder.name) < FIRST_UNSEEN]
    unseen = [data.City.load(folder) for folder in folders if int(folder.name) >= FIRST_UNSEEN]
    if args.check:
        model, processor = load_model(str(args.run / "model"))
        shares = gates(model, processor, unseen, 40)
        write_card(args.run / "model", model.num_parameters(), shares, len(unseen))
        print("\n".join(f"{name}: {share:.1%}" for name, share in shares.items()))
        return
    trainer = Trainer(cities, args.run, args.steps, args.batch_size, args.learning_rate)
    started, first, logged, saved, gated = (time.monotonic(), trainer.step, *[time.monotonic()] * 3)
    mean, found = 0.0, 0.0
    with (args.run / "log.txt").open("a", encoding="utf-8") as log:

        def note(text: str) -> None:
            log.write(f"{time.strftime('%H:%M:%S')} step {trainer.step}: {text}\n")
            log.flush()

        note(f"{trainer.model.num_parameters() / 1e6:.2f} million parameters, {len(cities)} cities, to step {args.steps}")
        while trainer.step < args.steps:
            loss, recall = trainer.train_step()
            share = 0.05 if mean else 1.0
            mean, found = (1 - share) * mean + share * loss, (1 - share) * found + share * recall
            now = time.monotonic()
            if now - logged > 60:
                logged = now
                note(f"loss {mean:.3f}, words found {found:.0%}, {(trainer.step - first) / (now - started):.2f} steps/s")
            if now - saved > 60 * args.save_minutes:
                saved = now
                trainer.save()
            if now - gated > 60 * args.gate_minutes:
                gated = now
                note(_gate_text(trainer, unseen))
        trainer.save()
        note(f"done; {_gate_text(trainer, unseen)}")


def _gate_text(trainer: Trainer, unseen: list[data.City]) -> str:
    recall, precision = tower_recall(trainer, unseen)
    text = f"unseen cities: tower finds {recall:.0%} of words, {precision:.0%} right"
    if trainer.step > int(TOWER_SHARE * trainer.steps):
        shares = gates(trainer.model, trainer.processor, unseen, 20)
        text += "".join(f", {name} {share:.0%}" for name, share in shares.items() if name in GATES)
    return text


if __name__ == "__main__":
    main()
