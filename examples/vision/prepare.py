# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
A tiny model that sees, and pictures of one colour with traces that name it: enough for a training step on a CPU.

    python examples/vision/prepare.py
    luffy train --model_name_or_path outputs/vision/model --dataset_name outputs/vision/data.parquet \
        --output_dir outputs/vision/run --reward_funcs examples.vision.prepare.names_the_colour \
        --use_cpu true --bf16 false --max_steps 1 --per_device_train_batch_size 8 --max_completion_length 16
"""

from pathlib import Path

import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Picture
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    Qwen2Tokenizer,
)


COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200), "yellow": (220, 200, 40)}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TILES = [[8, 16], [16, 8], [16, 16]]  # how images are cut


def names_the_colour(completions: list, answer: list[str], **kwargs) -> list[float]:
    """1 for a completion with the name of the colour."""
    return [float(name in completion[-1]["content"]) for completion, name in zip(completions, answer, strict=True)]


def make_model(folder: Path):
    """LLaVA-NeXT's architecture in small, with a token for each character."""
    specials = ["<|pad|>", "<|im_end|>", "<|im_start|>", "<image>"]
    characters = ["Ċ", "Ġ", *(chr(code) for code in range(33, 127))]
    tokenizer = Qwen2Tokenizer(
        {token: number for number, token in enumerate([*specials, *characters])},
        [],
        **{"unk_token": None, "pad_token": "<|pad|>", "eos_token": "<|im_end|>", "padding_side": "left"},
        extra_special_tokens=["<|im_start|>", "<image>"],
    )
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, image_grid_pinpoints=TILES
        ),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"model_type": "qwen2", "num_key_value_heads": 1, "max_position_embeddings": 512, "bos_token_id": None}
    text |= {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id, **small}
    vision = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, "projection_dim": 32, **small}
    config = LlavaNextConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=TILES,
    )
    torch.manual_seed(0)
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def make_data(file: Path):
    """Pictures of a colour each, with a trace that names it."""
    rows = [
        {
            "prompt": [{"role": "user", "content": "Which colour?"}],
            "images": [Picture.new("RGB", (16, 16), colour)],
            "demonstrations": [f"It is {name}."],
            "answer": name,
        }
        for name, colour in COLOURS.items()
    ]
    message = {"role": Value("string"), "content": Value("string")}
    columns = {"prompt": List(message), "images": List(Image()), "answer": Value("string")}
    features = Features({**columns, "demonstrations": List(Value("string"))})
    Dataset.from_list(rows * 4, features=features).to_parquet(file)


if __name__ == "__main__":
    folder = Path("outputs/vision")
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder / "model")
    make_data(folder / "data.parquet")
    print(f"A model and data are in {folder}.")
