# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Tiny models that see, of two architectures, with their real image processors. Nothing is downloaded."""

from pathlib import Path

import tiny
import torch
import trl
from PIL import Image
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)


TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CHATML_OF_PARTS = tiny.CHATML.replace(
    "{{ message.content }}",
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}",
)
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,
    "bos_token_id": None,
}


def make_tokenizer(specials):
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|endoftext|>", *specials]})
    return tokenizer


class QwenProcessor(Qwen2_5_VLProcessor):
    """Without the one for videos, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def make_qwen(seed=0):
    """Qwen2.5-VL: patches of all images in one tensor, and their grids."""
    specials = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = make_tokenizer(specials)
    template = (TEMPLATES / "qwen2_5_vl.jinja").read_text()
    processor = QwenProcessor(
        Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=256),
        tokenizer,
        chat_template=template,
    )
    ids = tokenizer.convert_tokens_to_ids(specials)
    names = ["vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"]
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 16,
    }
    config = Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        vision_config={**vision, "fullatt_block_indexes": [0], "window_size": 16},
        **dict(zip(names, ids, strict=True)),
    )
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(config), processor


def picture(number, size=16):
    """A picture that shows a number by its colour."""
    return Image.new("RGB", (size, size), (number * 50 % 256, number * 90 % 256, number * 130 % 256))


def make_llava(seed=0):
    """LLaVA-NeXT: five tiles an image, and the sizes of the images."""
    tokenizer = make_tokenizer(["<image>"])
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 8},
            crop_size={"height": 8, "width": 8},
            image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
        ),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHATML_OF_PARTS,
    )
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaNextConfig(
        text_config={
            **TEXT,
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            **vision,
            "model_type": "clip_vision_model",
            "image_size": 8,
            "patch_size": 4,
            "projection_dim": 16,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
    )
    torch.manual_seed(seed)
    return LlavaNextForConditionalGeneration(config), processor
