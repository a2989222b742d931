"""Scorers: real model classes with random weights, from a local folder, offline."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from data_tools.errors import DataToolsError, UsageError
from data_tools.scan import scan
from data_tools.scorers import load_scorer, score_all
from data_tools.scoring import choose_scorers
from tests.conftest import ROOT
from tests.data_tools.test_data_clean import fill
from tests.data_tools.test_data_cli import flat, run
from tests.data_tools.test_data_quality import scene

__all__ = ["run"]

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {"image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    """A ViT that knows two labels."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    labels = {0: "normal", 1: "nsfw"}
    config = ViTConfig(**TINY, **VISION, num_labels=2, id2label=labels, label2id={v: k for k, v in labels.items()})
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A CLIP with the embedded base's tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "finetune/demo/base/tokenizer")
    text = TINY | {"vocab_size": len(tokenizer), "max_position_embeddings": 32}
    text |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    CLIPModel(CLIPConfig(text_config=text, vision_config=TINY | VISION, projection_dim=8)).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_a_score_is_the_probability_of_the_label_alone_or_in_a_batch(classifier):
    """Whatever stands beside a picture in its batch must not change its number."""
    scorer = load_scorer(choose_scorers(["safety"], {"safety": str(classifier)}, {})[0])
    other = load_scorer(choose_scorers(["safety"], {"safety": str(classifier)}, {"safety": "Normal"})[0])
    images = [scene(), scene(200, 90, 1), scene(33, 70, 2)]
    scores = scorer.score(images)
    assert [scorer.score([image])[0] for image in images] == pytest.approx(scores, abs=1e-5)
    assert [a + b for a, b in zip(scores, other.score(images), strict=True)] == pytest.approx([1, 1, 1], abs=1e-5)


def test_zero_shot_compares_two_sentences(clip):
    """Swapping the sentences turns the score around."""
    spec = choose_scorers(["watermark"], {"watermark": str(clip)}, {})[0]
    scores = load_scorer(spec).score([scene(), scene(seed=1)])
    assert all(0 <= score <= 1 for score in scores)
    turned = load_scorer(type(spec)(spec.name, spec.model, spec.rule, None, spec.sentences[::-1]))
    assert [1 - score for score in turned.score([scene(), scene(seed=1)])] == pytest.approx(scores, abs=1e-5)


def test_scores_decide_and_are_kept_in_the_manifest(run, tmp_path, classifier):
    """Asked once, judged every time, until the picture changes."""
    folder = fill(tmp_path / "set", ("good.png", "good too.png"))
    options = ("--score", "safety", "--score-model", f"safety={classifier}")
    result = run("clean", folder, *options, "--limit", "safety=0", "--write")
    assert result.returncode == 0 and "2 review" in flat(result.stdout)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert all(0 < row["score_safety"] < 1 and "safety: score" in row["verdict_reasons"] for row in rows)
    assert "2 review" in flat(run("clean", folder, "--limit", "safety=0").stdout), "kept scores are judged again"
    assert "2 keep" in flat(run("clean", folder, "--limit", "safety=1").stdout)
    assert "safety" not in run("clean", fill(tmp_path / "other", ("good.png",))).stdout


def test_a_killed_run_asks_only_for_what_is_missing(classifier, tmp_path):
    """Models are slow: what one run has learned of a picture, the next one knows; other weights are asked again."""
    folder = fill(tmp_path / "set", ("good.png", "good too.png", "small.png"))
    records, scorer = scan(folder).records, load_scorer(choose_scorers(["safety"], {"safety": str(classifier)}, {})[0])
    first = score_all(folder, records[:2], [scorer])
    asked: list[int] = []
    counting = replace(scorer, score=lambda images: asked.append(len(images)) or scorer.score(images))
    assert score_all(folder, records, [counting])[:2] == first and asked == [1]
    assert score_all(folder, records, [counting])[:2] == first and asked == [1]
    score_all(folder, records, [replace(counting, weights="others")])
    assert asked == [1, 3]


def test_a_label_that_the_model_does_not_know_is_told_with_those_it_does(classifier, tmp_path):
    """Models call the same thing nsfw, porn, explicit."""
    with pytest.raises(UsageError, match=r"no label 'porn'; it has normal, nsfw"):
        load_scorer(choose_scorers(["safety"], {"safety": str(classifier)}, {"safety": "porn"})[0])
    own = choose_scorers(["mine"], {"mine": str(classifier)}, {"mine": "normal"})[0]
    assert own.name == "mine" and own.rule.above
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_scorer(choose_scorers(["safety"], {"safety": str(tmp_path)}, {})[0])


def test_pickled_weights_are_refused(classifier, tmp_path):
    """A pickle runs code when it is opened."""
    for path in classifier.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(DataToolsError, match=r"pytorch_model\.bin only") as caught:
        load_scorer(choose_scorers(["safety"], {"safety": str(tmp_path)}, {})[0])
    assert caught.value.exit_code == 8
