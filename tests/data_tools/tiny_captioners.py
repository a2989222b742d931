"""Random tiny models of the real captioner classes, saved as a hub would hold them; nothing is fetched."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertTokenizerFast,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPImageProcessorPil,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)

WORDS = ("red", "blue", "dog", "cat", "on", "grass", "sitting", "big", "small", "happy", "in", "the", "sun", "house")
CHAT = (
    "{% for turn in messages %}user: {% for part in turn['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} assistant:"
)
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def tokenizer(*special: str, ends: bool = False, **named: str) -> PreTrainedTokenizerFast:
    """Whole words; `special` are tokens of their own, `named` some of them by the name of an attribute."""
    names = ["<pad>", "<s>", "</s>", "<unk>", *special]
    core = Tokenizer(models.WordLevel({word: place for place, word in enumerate([*names, *WORDS])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    more = named or list(special)
    return PreTrainedTokenizerFast(tokenizer_object=core, **marks, extra_special_tokens=more)


def _words_only(model: torch.nn.Module, tokens: PreTrainedTokenizerFast) -> None:
    """Random weights would also say the special tokens; only plain words may come out."""
    plain = set(tokens.convert_tokens_to_ids(WORDS))
    model.generation_config.suppress_tokens = [place for place in range(len(tokens)) if place not in plain]


def _save(folder: Path, build: Callable, config, *parts, words: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(0)
    model = build(config)
    for parameter in model.parameters():
        # Wide enough that pictures make a difference to what is said.
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    _words_only(model, words)
    model.save_pretrained(folder)
    for part in parts:
        part.save_pretrained(folder)
    return folder


def blip(folder: Path) -> Path:
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = BertTokenizerFast(vocab={word: place for place, word in enumerate([*marks, *WORDS])})
    text = SMALL | {"vocab_size": len(words), "encoder_hidden_size": 32, "max_position_embeddings": 256}
    text |= {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0, "projection_dim": 32}
    config = BlipConfig(text_config=text, vision_config=SMALL | {"image_size": 32, "patch_size": 8}, projection_dim=32)
    images = BlipImageProcessorPil(size={"height": 32, "width": 32})
    return _save(folder, BlipForConditionalGeneration, config, BlipProcessor(images, words), words=words)


def blip2(folder: Path) -> Path:
    words = tokenizer("<image>", ends=True)
    text = {"model_type": "opt", "hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": len(words), "max_position_embeddings": 128, "word_embed_proj_dim": 32}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    former = SMALL | {"encoder_hidden_size": 32, "vocab_size": 30}
    config = Blip2Config(
        vision_config=SMALL | {"image_size": 32, "patch_size": 8}, qformer_config=former, text_config=text,
        num_query_tokens=4, image_token_index=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    images = BlipImageProcessorPil(size={"height": 32, "width": 32})
    return _save(folder, Blip2ForConditionalGeneration, config, Blip2Processor(images, words, 4), words=words)


def florence2(folder: Path) -> Path:
    words = tokenizer("<image>", image_token="<image>")
    text = {"model_type": "bart", "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": len(words)}
    text |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    text |= {"max_position_embeddings": 128, "forced_eos_token_id": None, "forced_bos_token_id": None}
    vision = {"depths": [1] * 4, "embed_dim": [16] * 4, "num_heads": [2] * 4, "num_groups": [2] * 4, "window_size": 4}
    vision |= {"projection_dim": 32, "max_position_embeddings": 10, "drop_path_rate": 0.0}
    vision |= {"patch_size": [7, 3, 3, 3], "patch_stride": [4, 2, 2, 2], "patch_padding": [3, 1, 1, 1]}
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=words.image_token_id)
    images = CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False)
    images.image_seq_length = 5
    processor = Florence2Processor(images, words)
    return _save(folder, Florence2ForConditionalGeneration, config, processor, words=words)


def smolvlm(folder: Path) -> Path:
    rows = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    words = tokenizer("<image>", "<fake_token_around_image>", "<global-img>", *rows)
    words.chat_template = CHAT.replace("IMAGE", "<image>")
    text = SMALL | {"model_type": "llama", "vocab_size": len(words), "num_key_value_heads": 2, "head_dim": 16}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = SmolVLMConfig(
        text_config=text, vision_config=SMALL | {"image_size": 32, "patch_size": 8}, scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"), pad_token_id=0,
    )  # fmt: skip
    images = SmolVLMImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    return _save(folder, SmolVLMForConditionalGeneration, config, words, images, words=words)


def qwen_vl(folder: Path) -> Path:
    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    words = tokenizer(*names)
    words.chat_template = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    text = SMALL | {"vocab_size": len(words), "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1}
    text |= {"eos_token_id": 2, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 4]}}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1, "patch_size": 4}
    keys = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = dict(zip(keys, words.convert_tokens_to_ids(list(names)), strict=True))
    config = Qwen2VLConfig(text_config=text, vision_config=vision | {"spatial_merge_size": 2}, **ids)
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 32 * 32}
    )
    return _save(folder, Qwen2VLForConditionalGeneration, config, words, images, words=words)


TAGS = (("sensitive", 9), ("1girl", 0), ("long_hair", 0), ("^_^", 0), ("red", 0), ("miku_(singer)", 4))


def wd_tagger(folder: Path, batch: int | str = "batch", tags: tuple = TAGS) -> Path:
    """Probability of a tag: a sigmoid of the mean blue, green and red, each tag with weights of its own."""
    weights = np.array([[9, 0, 0, 0, 0, 0], [0, 0, 9, 0, 0, 0], [0, 0, 0, 0, 9, 9]], dtype=np.float32)
    bias = np.array([0, 9, -3, 9, -4.5, -4.5], dtype=np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["pixels", "sides"], ["colors"], keepdims=0),
        helper.make_node("Div", ["colors", "white"], ["shares"]),
        helper.make_node("Gemm", ["shares", "weights", "bias"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["tags"]),
    ]
    constants = {"sides": np.array([1, 2]), "white": np.float32(255), "weights": weights, "bias": bias}
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [batch, 16, 16, 3])],
        [helper.make_tensor_value_info("tags", TensorProto.FLOAT, [batch, 6])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    with (folder / "selected_tags.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("tag_id", "name", "category", "count"), *((0, *tag, 1) for tag in tags)])
    return folder


BUILDERS = {
    "blip": blip, "blip2": blip2, "florence2": florence2, "smolvlm": smolvlm, "qwen_vl": qwen_vl,
    "wd_tagger": wd_tagger,
}  # fmt: skip
