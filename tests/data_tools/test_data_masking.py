"""Masks: found by real model classes with random weights or read from transparency, and what training reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessorPil,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    GroundingDinoProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    Owlv2Processor,
    ResNetConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
    SwinConfig,
    ViTImageProcessorPil,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)

from data_tools.clean import Options, examine, write
from data_tools.errors import DataToolsError, UsageError
from data_tools.focus import focus_on_masks
from data_tools.folder import list_folder
from data_tools.masking import Looking, make, plan
from data_tools.models import Source
from data_tools.processes import ALONE, Share
from data_tools.scan import scan
from data_tools.segmenters import _drawn, load
from tests.conftest import ROOT
from tests.data_tools.test_data_cli import flat, run

__all__ = ["run"]

SUBJECT = (slice(40, 80), slice(90, 150))
"""Rows and columns of the red subject in every picture of `photos`, 200 x 120 pixels."""


@pytest.fixture
def photos(tmp_path) -> Path:
    """Grey pictures with a red box, one of them in a folder of its own."""
    folder = tmp_path / "photos"
    for number, name in enumerate(("a.png", "b.jpg", "inner/c.webp")):
        pixels = np.full((120, 200, 3), 100 + number, np.uint8)
        pixels[SUBJECT] = (250, 10, 10)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
        (folder / name).with_suffix(".txt").write_text("a photo of sks box")
    return folder


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory) -> Path:
    """A CLIPSeg with the embedded base's tokenizer."""
    folder = tmp_path_factory.mktemp("clipseg")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "finetune/demo/base/tokenizer")
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    text = tiny | {"vocab_size": len(tokenizer), "max_position_embeddings": 32}
    text |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPSegConfig(
        text_config=text, vision_config=tiny | {"image_size": 32, "patch_size": 8}, projection_dim=16,
        reduce_dim=16, extract_layers=[1, 2, 3], decoder_num_attention_heads=2, decoder_intermediate_size=16,
    )  # fmt: skip
    CLIPSegForImageSegmentation(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def segformer(tmp_path_factory) -> Path:
    """A SegFormer that knows three labels."""
    folder = tmp_path_factory.mktemp("segformer")
    torch.manual_seed(0)
    labels = {0: "wall", 1: "Dog", 2: "sky"}
    config = SegformerConfig(
        hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1], decoder_hidden_size=8,
        id2label=labels, label2id={name: number for number, name in labels.items()},
    )  # fmt: skip
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    SegformerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


LABELS = {0: "Person", 1: "face", 2: "car"}
SHAPE = {"shortest_edge": 64, "longest_edge": 96}


def yolos(folder: Path) -> None:
    """A detector with labels that sees the picture as patches."""
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[64, 96],
        num_detection_tokens=5, id2label=LABELS, label2id={name: number for number, name in LABELS.items()},
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessorPil(size=SHAPE).save_pretrained(folder)


def detr(folder: Path) -> None:
    """A detector with labels over a convolutional network."""
    tiny = {f"{part}_{what}": 1 for part in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")}
    config = DetrConfig(
        backbone_config=ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], out_features=["stage1"]),
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, d_model=16, num_queries=5, **tiny,
        id2label=LABELS, label2id={name: number for number, name in LABELS.items()},
    )  # fmt: skip
    DetrForObjectDetection(config).save_pretrained(folder)
    DetrImageProcessorPil(size=SHAPE).save_pretrained(folder)


def owlv2(folder: Path) -> None:
    """A detector that is told in words and sees the picture padded to a square."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "finetune/demo/base/tokenizer")
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tiny | {"vocab_size": len(tokenizer), "max_position_embeddings": 32}
    text |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision = tiny | {"image_size": 32, "patch_size": 8}
    config = Owlv2Config(text_config=text, vision_config=vision, projection_dim=16)
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)


def grounding(folder: Path) -> None:
    """A detector that is told in words, all in one sentence."""
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "a", "face", "person")
    tiny = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("attention_heads", "ffn_dim")}
    language = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4, out_features=["stage1", "stage2"]
        ),
        text_config=BertConfig(vocab_size=len(words), **language), d_model=32, num_queries=5, num_feature_levels=2,
        max_text_len=16, encoder_layers=1, decoder_layers=2, **tiny,
    )  # fmt: skip
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    GroundingDinoProcessor(GroundingDinoImageProcessorPil(size=SHAPE), tokenizer).save_pretrained(folder)


def red(pictures):
    """A model of known answer: as likely as it is red, at a quarter of the size."""
    small = [np.asarray(picture.reduce(4), np.float32) for picture in pictures]
    return [np.clip((pixels[..., 0] - pixels[..., 1]) / 255, 0, 1) for pixels in small]


def test_masks_are_what_training_reads(photos):
    """Written under the names by which a scan finds them, in the picture's size, white on the subject."""
    listing = list_folder(photos)
    make(listing, plan(listing, {}, False, ALONE), Looking(red, batch=2), write=True)
    result = scan(photos)
    assert not result.of("error")
    assert [record.mask_file for record in result.records] == ["masks/a.png", "masks/b.png", "masks/inner/c.png"]
    for record in result.records:
        mask = np.asarray(Image.open(photos / str(record.mask_file)))
        assert mask.shape == (120, 200) and set(np.unique(mask)) == {0, 255}
        truth = np.zeros_like(mask, bool)
        truth[SUBJECT] = True
        assert np.mean((mask > 0) != truth) < 0.02
    focus = focus_on_masks(photos, result.records)[0].focus
    assert focus == pytest.approx((0.6, 0.5, 0, 0), abs=0.01), "crops can look at the subject"


def test_growing_widens_by_a_share_of_the_picture(photos):
    """Hair and soft edges lie outside of what a model is sure of."""
    listing = list_folder(photos)
    plain, grown = (
        make(listing, plan(listing, {}, False, ALONE), Looking(red, grow=grow), write=False) for grow in (0, 0.1)
    )
    assert plain.shares["a.png"] == pytest.approx(0.1, abs=0.01)
    assert grown.shares["a.png"] == pytest.approx((40 + 40) * (60 + 40) / 24000, abs=0.03)
    assert not (photos / "masks").exists(), "nothing is written unless asked"


def test_clipseg_is_asked_for_each_text_and_any_of_them_counts(clipseg, photos):
    """Against the model called directly, alone or in a batch, whatever the number of texts."""
    pictures = [Image.open(photos / name).convert("RGB") for name in ("a.png", "b.jpg")]
    both = load(Source(str(clipseg)), ["a dog", "a very long red box"], None).find(pictures)
    texts = ("a dog", "a very long red box")
    alone = [load(Source(str(clipseg)), [text], None).find(pictures[:1])[0] for text in texts]
    assert both[0] == pytest.approx(np.maximum(*alone), abs=1e-5) and not np.allclose(*alone)
    model = CLIPSegForImageSegmentation.from_pretrained(clipseg).eval()
    pixels = ViTImageProcessorPil.from_pretrained(clipseg)(images=pictures[:1], return_tensors="pt")
    words = AutoTokenizer.from_pretrained(clipseg)(["a dog"], return_tensors="pt")
    with torch.no_grad():
        expected = model(**words, **pixels).logits.sigmoid().squeeze().numpy()
    assert alone[0] == pytest.approx(expected, abs=1e-5) and expected.ndim == 2


def test_a_model_with_labels_adds_up_those_wanted(segformer, photos):
    """A dog in one model is Dog in the next; all labels together are everywhere."""
    pictures = [Image.open(photos / name).convert("RGB") for name in ("a.png", "b.jpg")]
    source = Source(str(segformer))
    wanted = (["wall", "dog", "sky"], ["DOG"])
    (everything, _), (dog, _) = (load(source, names, None).find(pictures) for names in wanted)
    assert everything == pytest.approx(1, abs=1e-5) and dog.ndim == 2 and 0 < dog.mean() < 1
    with pytest.raises(UsageError, match=r"no label 'cat'; it has dog, sky, wall\. A CLIPSeg"):
        load(source, ["cat", "dog"], None)


@pytest.mark.parametrize("build", [yolos, detr, owlv2, grounding])
def test_the_boxes_of_a_detector_become_masks(build, tmp_path, photos):
    """Each box of what is wanted as likely as it is, and nowhere else; alone or with others in a batch."""
    torch.manual_seed(0)
    build(tmp_path)
    pictures = [Image.open(photos / name).convert("RGB") for name in ("a.png", "b.jpg")]
    pictures.append(pictures[0].rotate(90, expand=True))
    source = Source(str(tmp_path))
    finder = load(source, ["a face", "a person"] if build in (owlv2, grounding) else ["FACE", "person", "car"], None)
    found = finder.find(pictures)
    assert [chances.shape for chances in found] == [(154, 256), (154, 256), (256, 154)]
    assert all(0 < chances.max() <= 1 and len(np.unique(chances)) <= 17 for chances in found), "boxes, not shades"
    assert np.array_equal(found[2], finder.find(pictures[2:])[0])
    if build in (yolos, detr):
        only = [load(source, [label], None).find(pictures)[0] for label in LABELS.values()]
        assert np.array_equal(found[0], np.maximum.reduce(only)) and finder.threshold == 0.5
        with pytest.raises(UsageError, match="no label 'dog'; it has car, face, person"):
            load(source, ["dog"], None)


def test_a_box_is_drawn_where_it_is():
    """Against pixels: a box in the picture's own measure, cut off at its edges; of two boxes the likelier counts."""
    boxes = torch.tensor([[90.0, 40.0, 150.0, 80.0], [-20.0, 70.0, 100.0, 300.0], [300.0, 0.0, 400.0, 9.0]])
    drawn = _drawn((200, 120), boxes, torch.tensor([0.9, 0.4, 0.8]))
    big = np.asarray(Image.fromarray(drawn).resize((200, 120)))
    expected = np.zeros((120, 200), np.float32)
    expected[70:, :100] = 0.4
    expected[SUBJECT] = 0.9
    assert np.mean(np.abs(big - expected) > 0.1) < 0.02


def test_a_model_that_cannot_be_used_is_told(segformer, clipseg, tmp_path):
    """Not there, of another kind, pickled."""
    with pytest.raises(UsageError, match="--model"):
        load(Source(str(tmp_path / "nothing")), ["dog"], None)
    with pytest.raises(UsageError, match="No masks can be found"):
        load(Source(str(ROOT / "finetune/demo/base/text_encoder")), ["dog"], None)
    for path in segformer.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(DataToolsError, match=r"pytorch_model\.bin only") as caught:
        load(Source(str(tmp_path)), ["dog"], None)
    assert caught.value.exit_code == 8


def test_the_command_previews_writes_and_keeps_what_is_painted(run, photos, clipseg, tmp_path):
    """Look first; then all; a mask that somebody painted stays, and a second run has nothing to do."""
    options = ("mask", photos, "--of", "a red box", "--model", clipseg, "--threshold", "0.01")
    seen = run(*options, "--picture", tmp_path / "sheet.png")
    assert seen.returncode == 0 and "Looked at 3 of 3" in flat(seen.stdout) and not (photos / "masks").exists()
    assert Image.open(tmp_path / "sheet.png").size == (720, 240)
    (photos / "masks").mkdir()
    Image.new("L", (200, 120), 255).save(photos / "masks/b.png")
    painted = (photos / "masks/b.png").read_bytes()
    said = run(*options, "--write")
    assert said.returncode == 0 and "Wrote 2 masks" in said.stdout and "1 picture has a mask already" in said.stdout
    assert (photos / "masks/b.png").read_bytes() == painted and (photos / "masks/inner/c.png").exists()
    assert "there is nothing to do" in run(*options, "--write").stdout
    assert "Wrote 3 masks" in run(*options, "--write", "--replace").stdout
    write(examine(photos, Options()))
    assert "3 pictures have a mask" in run(*options, "--write").stdout, "as the manifest names them, too"


def test_transparency_becomes_a_mask_and_opaque_pictures_are_named(run, photos):
    """Cut-out pictures bring their masks along; soft edges stay soft."""
    pixels = np.full((60, 80, 4), 200, np.uint8)
    pixels[..., 3] = np.linspace(0, 255, 80).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(photos / "cut out.png", exif=exif)
    (photos / "cut out.txt").write_text("x")
    said = run("mask", photos, "--alpha", "--write")
    assert said.returncode == 0 and "a.png, b.jpg, inner/c.webp (3 files): is opaque everywhere" in flat(said.stdout)
    again = run("mask", photos, "--alpha", "--write")
    assert again.returncode == 0 and "Wrote 0 masks" in again.stdout and "1 picture has a mask already" in again.stdout
    mask = np.asarray(Image.open(photos / "masks/cut out.png"))
    assert mask.shape == (80, 60) and (mask == mask[:, :1]).all() and mask[0, 0] == 0 and mask[-1, 0] == 255
    assert not [p for p in scan(photos).of("error") if "mask" in str(p)]


def test_what_is_not_found_or_has_no_place_is_told(run, photos, segformer):
    """An all black mask would silence a picture; two pictures of one name would share one."""
    Image.new("RGB", (64, 64)).save(photos / "a.webp")
    Image.new("L", (200, 120), 255).save(photos / "b-masklabel.png")
    result = run("mask", photos, "--of", "dog", "--model", segformer, "--threshold", "1", "--replace", "--write")
    assert result.returncode == 3 and not (photos / "masks").exists()
    for words in ("shows nothing of what is looked for", "a.webp: shares its mask with a.png",
                  "b.jpg: has the mask b-masklabel.png"):  # fmt: skip
        assert words in flat(result.stderr), words
    assert run("mask", photos).returncode == run("mask", photos, "--of", "x", "--alpha").returncode == 2


def test_processes_share_the_pictures(photos):
    """Each picture is one process's, and a picture without a share is nobody's."""
    listing = list_folder(photos)
    shares = [set(plan(listing, {}, False, Share(rank, 3)).files) for rank in range(3)]
    assert set().union(*shares) == set(listing.pictures) and sum(map(len, shares)) == 3
