"""Train the toy base model: a small LLaVA (CLIP tower, two-layer adapter, llama) from scratch on the lessons.

    python -m addressvlm.tools.toy_base_data /tmp/lessons --cities 72 --first-seed 2000
    python -m addressvlm.tools.toy_base_encoder /tmp/lessons /tmp/sight.safetensors --minutes 10
    python -m addressvlm.tools.toy_base /tmp/lessons addressvlm/demo/base --sight /tmp/sight.safetensors --minutes 14

The result is an ordinary Hugging Face folder. The checked-in one was made so on two busy cores, in about 1,030 and 1,880
steps; time, not steps, is what limits it, so that another machine makes a slightly other one, and a quiet one a better one.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from addressvlm.demo.world import DISTRICTS, KINDS, WORDS
from addressvlm.storage import tables
from addressvlm.training.collator import Collator, Sample, sample_from_row
from addressvlm.training.dataset import Schedule, TableRows
from addressvlm.training.loss import answer_loss, learning_rate

PAD, USER, ASSISTANT, END, IMAGE = "<pad>", "<|user|>", "<|assistant|>", "<|end|>", "<image>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocabulary` entries that can spell any text (its alphabet is all 256 bytes)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, USER, ASSISTANT, END, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, extra_special_tokens=[USER, ASSISTANT, IMAGE]
    )


SIDE, PATCH = 144, 16  # pixels
VOCABULARY = 1024
TEXTS = 6000  # conversations that the tokenizer is trained on
ROUNDS = 4  # of a conversation that are used
MIXED = 8  # batches whose samples are sorted by length together
SHORT = 0.6  # share of the time in which only the shorter half of the lessons is taught


def vision_config() -> CLIPVisionConfig:
    """The vision encoder: 81 patches, four layers."""
    return CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, image_size=SIDE, patch_size=PATCH
    )


def image_processor() -> CLIPImageProcessorPil:
    """Any picture to SIDE x SIDE pixels."""
    return CLIPImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False)


def build(tokenizer: PreTrainedTokenizerFast) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A randomly initialized model of 2.6 million parameters, and its processor."""
    text = LlamaConfig(
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision_config(),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    processor = LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer,
        patch_size=PATCH,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )
    return LlavaForConditionalGeneration(config), processor


def texts(lessons: Path) -> list[str]:
    """What the tokenizer must spell well: conversations, and every word that a street or district is made of."""
    said = [
        f"{r['question']} {r['answer']}"
        for row in islice(tables.iter_rows(lessons, "train", ["rounds"]), TEXTS)
        for r in row["rounds"]
    ]
    names = [f" {word}" for word in (*WORDS, *KINDS, *DISTRICTS)]
    return said + names * 200


def by_length(schedule: Schedule, batch_size: int, short: Callable[[], bool]) -> Iterator[list[Sample]]:
    """Batches of conversations of about the same length, so that little is padded; at most `ROUNDS` rounds each.

    While `short()` is true only the shorter half of the lessons is taught: those in which nearly every word is seen.
    """
    for step in count():
        samples = [sample_from_row(schedule.rows[i]) for i in schedule.indices(step)]
        samples = [Sample(s.image, s.rounds[:ROUNDS]) for s in samples]
        samples.sort(key=lambda s: sum(len(q) + len(a) for q, a in s.rounds))
        starts = list(range(0, len(samples) // 2 if short() else len(samples), batch_size))
        random.Random(step).shuffle(starts)
        yield from (samples[at : at + batch_size] for at in starts)


def main() -> None:
    """Train for the given time and save model and processor as bfloat16 safetensors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lessons", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sight", type=Path, required=True, help="weights that addressvlm.tools.toy_base_encoder wrote")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = train_tokenizer(texts(args.lessons), VOCABULARY)
    model, processor = build(tokenizer)
    model.model.vision_tower.load_state_dict(load_file(args.sight))
    model.set_attn_implementation("eager")  # on a CPU its backward pass takes a third of sdpa's time
    print(f"base: {model.num_parameters() / 1e6:.2f} million parameters", flush=True)
    learning = [p for name, p in model.named_parameters() if "vision_tower" not in name]
    model.model.vision_tower.requires_grad_(False)  # it has been to school; a beginner's gradients would spoil it
    optimizer = torch.optim.AdamW(learning, lr=0.0, betas=(0.9, 0.98), weight_decay=0.05)
    collate, started, step, total, mean = Collator(processor, apart=True), time.monotonic(), 0, 10_000, 0.0
    schedule = Schedule(TableRows(args.lessons, "train"), args.batch_size * MIXED, seed=0)
    batches = by_length(schedule, args.batch_size, lambda: time.monotonic() - started < SHORT * args.minutes * 60)
    while (elapsed := time.monotonic() - started) < args.minutes * 60:
        if step >= 20:  # by now the pace is known: the learning rate falls to zero when the time is over
            total = max(step + 1, round(step * args.minutes * 60 / elapsed))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, args.learning_rate, 0.03)
        batch = collate(next(batches))
        with torch.autocast("cpu", torch.bfloat16):
            loss, tokens = answer_loss(model, batch)
        (loss / tokens).backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = 0.98 * mean + 0.02 * (loss.item() / tokens.item()) if step else loss.item() / tokens.item()
        if step % 50 == 0:
            print(f"base: step {step}/{total}, loss {mean:.3f}, {elapsed:.0f} s", flush=True)
        step += 1
        if step % 500 == 0:
            save(model, processor, args.out)
    save(model, processor, args.out)


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path) -> None:
    """Write a bfloat16 copy in shards of a few megabytes; the model trained on stays as it is."""
    state = {key: value.to(torch.bfloat16) for key, value in model.state_dict().items() if key != "lm_head.weight"}
    model.save_pretrained(out, state_dict=state, max_shard_size="4MB")
    processor.save_pretrained(out)


if __name__ == "__main__":
    main()
