"""Train the toy base model from scratch: a small LLaVA (CLIP vision tower, two-layer adapter, llama).

    python -m addressvlm.tools.toy_base_data /tmp/toy-data --cities 72 --first-seed 2000
    python -m addressvlm.tools.toy_base_encoder /tmp/toy-data /tmp/encoder.safetensors --minutes 10
    python -m addressvlm.tools.toy_base /tmp/toy-data addressvlm/demo/base --encoder /tmp/encoder.safetensors --minutes 14

The result is a Hugging Face model folder. The checked-in one took about 1,030 and 1,880 steps on two busy cores. Training is
limited by time, not by steps, so another machine gives a slightly different model.
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
from addressvlm.training.loss import answer_loss
from addressvlm.training.optim import learning_rate

PAD, USER, ASSISTANT, END, IMAGE = "<pad>", "<|user|>", "<|assistant|>", "<|end|>", "<image>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `vocabulary` entries."""
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
TOKENIZER_CONVERSATIONS = 6000
MAX_ROUNDS = 4  # of a conversation
SORTED_BATCHES = 8  # batches whose samples are sorted by length together
SHORT_SHARE = 0.6  # share of the training time with only the shorter half of the samples


def vision_config() -> CLIPVisionConfig:
    """The vision encoder: 81 patches, four layers."""
    return CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, image_size=SIDE, patch_size=PATCH
    )


def image_processor() -> CLIPImageProcessorPil:
    """Resizes any image to SIDE x SIDE pixels."""
    return CLIPImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False)


def build(tokenizer: PreTrainedTokenizerFast) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A randomly initialized model of 2.6 million parameters, and its processor."""
    text = LlamaConfig(
        hidden_size=192, intermediate_size=384, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=6,
        vocab_size=len(tokenizer), max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
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


def tokenizer_texts(data: Path) -> list[str]:
    """Texts to train the tokenizer on: conversations, and every word of street and district names."""
    conversations = [
        f"{r['question']} {r['answer']}"
        for row in islice(tables.iter_rows(data, "train", ["rounds"]), TOKENIZER_CONVERSATIONS)
        for r in row["rounds"]
    ]
    names = [f" {word}" for word in (*WORDS, *KINDS, *DISTRICTS)]
    return conversations + names * 200


def batches_by_length(schedule: Schedule, batch_size: int, only_short: Callable[[], bool]) -> Iterator[list[Sample]]:
    """Batches of conversations of similar length, for little padding, of at most `MAX_ROUNDS` rounds each.

    While `only_short()` is true, only the shorter half: conversations mostly about what the image shows.
    """
    for step in count():
        samples = [sample_from_row(schedule.rows[i]) for i in schedule.indices(step)]
        samples = [Sample(s.image, s.rounds[:MAX_ROUNDS]) for s in samples]
        samples.sort(key=lambda s: sum(len(q) + len(a) for q, a in s.rounds))
        starts = list(range(0, len(samples) // 2 if only_short() else len(samples), batch_size))
        random.Random(step).shuffle(starts)
        yield from (samples[start : start + batch_size] for start in starts)


def main() -> None:
    """Train for the requested time and save model and processor as bfloat16 safetensors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that addressvlm.tools.toy_base_data wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("--encoder", type=Path, required=True, help="weights that addressvlm.tools.toy_base_encoder wrote")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = train_tokenizer(tokenizer_texts(args.data), VOCABULARY)
    model, processor = build(tokenizer)
    model.model.vision_tower.load_state_dict(load_file(args.encoder))
    model.set_attn_implementation("eager")  # on a CPU its backward pass takes a third of sdpa's time
    print(f"base: {model.num_parameters() / 1e6:.2f} million parameters", flush=True)
    trainable = [p for name, p in model.named_parameters() if "vision_tower" not in name]
    model.model.vision_tower.requires_grad_(False)  # pretrained; the gradients of an untrained language model would spoil it
    optimizer = torch.optim.AdamW(trainable, lr=0.0, betas=(0.9, 0.98), weight_decay=0.05)
    collate, started, step, total, mean = Collator(processor, isolate_questions=True), time.monotonic(), 0, 10_000, 0.0
    schedule = Schedule(TableRows(args.data, "train"), args.batch_size * SORTED_BATCHES, seed=0)
    batches = batches_by_length(schedule, args.batch_size, lambda: time.monotonic() - started < SHORT_SHARE * args.minutes * 60)
    while (elapsed := time.monotonic() - started) < args.minutes * 60:
        if step >= 20:  # steps per minute are measurable: the learning rate reaches zero when the time is over
            total = max(step + 1, round(step * args.minutes * 60 / elapsed))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, args.learning_rate, 0.03)
        batch = collate(next(batches))
        with torch.autocast("cpu", torch.bfloat16):
            loss, tokens = answer_loss(model, batch)
        (loss / tokens).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
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
    """Save a bfloat16 copy in shards of a few megabytes; the model itself is not changed."""
    state = {key: value.to(torch.bfloat16) for key, value in model.state_dict().items() if key != "lm_head.weight"}
    model.save_pretrained(out, state_dict=state, max_shard_size="4MB")
    processor.save_pretrained(out)


if __name__ == "__main__":
    main()
