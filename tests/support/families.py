"""Tiny random models of three families, each with a gazetteer: LLaVA, FastVLM (ResNet tower), Qwen2.5-VL (2-D positions)."""

import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlamaConfig,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    ResNetConfig,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from addressvlm.answers.sequence_scorer import SequenceScorer
from addressvlm.inference import Localizer
from addressvlm.models import load_model
from addressvlm.tools.toy_base import CHAT_TEMPLATE, train_tokenizer
from tests.support.tiny import TEXT, tiny_llava

QWEN_MARKS = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]


class QwenProcessor(Qwen2_5_VLProcessor):
    """One that does without a video processor, which would need torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


def tiny_fastvlm(folder):
    """A random FastVLM: ResNet tower, adapter, llama."""
    _, llava = load_model(str(tiny_llava(folder / "llava")))
    tokenizer = llava.tokenizer
    torch.manual_seed(1)
    config = FastVlmConfig(
        vision_config=ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], hidden_size=16),
        text_config=LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False),
        tokenizer=tokenizer, patch_size=8, num_additional_image_tokens=0, vision_feature_select_strategy="full",
        image_token="<image>", chat_template=llava.chat_template,
    )  # fmt: skip
    FastVlmForConditionalGeneration(config).save_pretrained(folder / "fast")
    processor.save_pretrained(folder / "fast")
    return folder / "fast"


def qwen_shape(kind, text, vision):
    """A tokenizer, and a config of that kind with what its text and vision parts have beside the rest."""
    tokenizer = train_tokenizer(TEXT, 330)
    tokenizer.add_special_tokens({"additional_special_tokens": QWEN_MARKS})
    start, image, end, video = (tokenizer.convert_tokens_to_ids(mark) for mark in QWEN_MARKS)
    return tokenizer, kind(
        text_config={
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": len(tokenizer), "bos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, **text,
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32, "patch_size": 8,
            **vision,
        },
        vision_start_token_id=start, image_token_id=image, vision_end_token_id=end, video_token_id=video,
    )  # fmt: skip


def qwen_processor(kind, tokenizer):
    """A processor of that kind for pictures of 8 x 8 pixels a patch."""
    template = CHAT_TEMPLATE.replace("<image>", "".join(QWEN_MARKS[:3]))
    images = Qwen2VLImageProcessorPil(patch_size=8, min_pixels=256, max_pixels=4096)
    return kind(images, tokenizer, None, chat_template=template)


def tiny_qwen():
    """A random Qwen2.5-VL and its processor: images of any size, positions in rows and columns."""
    tokenizer, config = qwen_shape(
        Qwen2_5_VLConfig, {"max_window_layers": 2}, {"window_size": 32, "fullatt_block_indexes": [1]}
    )
    torch.manual_seed(2)
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="eager")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.eval(), qwen_processor(QwenProcessor, tokenizer)


def localizer_of(family, folder, gazetteer):
    """A Localizer of the family, with larger logits, so that answers differ clearly."""
    folder = folder / family
    folder.mkdir(parents=True)
    loaded = tiny_qwen() if family == "qwen" else None
    model = {"llava": tiny_llava, "fastvlm": tiny_fastvlm, "qwen": lambda folder: folder}[family](folder)
    gazetteer.save(model / "gazetteer.geojson")
    localizer = Localizer(model, device="cpu", loaded=loaded)
    with torch.no_grad():
        localizer.model.get_output_embeddings().weight.mul_(20)
    return localizer


def picture(seed, size=(40, 30)):
    """Noise; no two seeds alike."""
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


@torch.inference_mode()
def log_likelihoods(localizer, image, question, answers):
    """ln p(answer and its end | image, question) of each answer, float64 (answers,), by the package's own scorer."""
    ((_, state),) = localizer.prefill_questions([image], [question])
    return SequenceScorer(localizer, localizer.trie(answers)).score(state)[0]


def naive_log_likelihood(localizer, image, question, answer, first=None):
    """Of the answer's `first` tokens (or all): the whole conversation in one forward pass, nothing cached."""
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    prompt = localizer.processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    text = prompt + answer + localizer.tokenizer.eos_token
    inputs = localizer.processor(text=[text], images=[image], return_tensors="pt")
    n = len(localizer.tokenizer(answer + localizer.tokenizer.eos_token)["input_ids"])
    log_p = torch.log_softmax(localizer.model(**inputs).logits[0, :-1].double(), dim=-1)
    return log_p.gather(1, inputs["input_ids"][0, 1:, None])[-n:][:first].sum()
