"""Learned words go through every layout as they are, and into the files that other programs read."""

from __future__ import annotations

import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.adapters.files import AdapterFile, AdapterHeader
from finetune.errors import CheckpointError, UserError
from finetune.families import load_family
from finetune.header import read_header
from finetune.interchange.adapter import InterchangeError
from finetune.interchange.commands import convert_adapter, merge_adapters
from finetune.interchange.comparing import diff_adapters
from finetune.interchange.embeddings import file_names
from finetune.interchange.inspection import inspect_file
from finetune.interchange.reading import read_adapter
from tests.interchange.files import noise, write
from tests.tiny import BUILDERS, random_adapter


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Family -> (base, adapter file of a run with two learned words), for one text encoder and for two."""
    folder, made = tmp_path_factory.mktemp("words"), {}
    for name in ("sd1", "sdxl"):
        base = BUILDERS[name](folder / name)
        family, components = load_family(str(base))
        file = random_adapter(family, components, rank={"unet": 2}, alpha={"unet": 1.0}, preset="attention")
        file.header = AdapterHeader(**{**vars(file.header), "tokens": ("<sks>", "artsy")})
        for encoder, network in components.text_encoders.items():
            width = network.config.hidden_size
            vectors = {f"{encoder}.token_embedding.{i}": noise(1 + i, width, key=i) for i in range(2)}
            file.tensors |= vectors
        file.save(folder / f"{name}.safetensors")
        made[name] = base, folder / f"{name}.safetensors"
    return made


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft", "ours"])
def test_words_come_back_from_every_layout(family, layout, trained, tmp_path):
    """To a layout and back to our own file: the same words, the same vectors, the same order, to the bit."""
    base, source = trained[family]
    there = tmp_path / ("there" if layout == "peft" else "there.safetensors")
    convert_adapter(source, there, to=layout, base=base, dtype="" if layout == "ours" else "fp16")
    convert_adapter(there, tmp_path / "back.safetensors", to="ours", base=base)
    wanted, found = AdapterFile.read(source), AdapterFile.read(tmp_path / "back.safetensors")
    assert set(found.header.tokens) == {"<sks>", "artsy"}
    for encoder in ("text_encoder", "text_encoder_2")[: 1 + (family == "sdxl")]:
        ours, theirs = wanted.token_vectors(encoder), found.token_vectors(encoder)
        assert ours.keys() == theirs.keys() == {"<sks>", "artsy"}
        assert all(torch.equal(ours[word], theirs[word]) for word in ours)


def test_kohya_files_bundle_words_as_a1111_reads_them(trained, tmp_path):
    """One encoder: string_to_param with the key *; two: clip_l and clip_g, both or A1111 does not know them."""
    for family, endings in (("sd1", {"string_to_param.*"}), ("sdxl", {"clip_l", "clip_g"})):
        base, source = trained[family]
        convert_adapter(source, tmp_path / f"{family}.safetensors", to="kohya", base=base)
        keys = {key for key in load_file(tmp_path / f"{family}.safetensors") if key.startswith("bundle_emb.")}
        assert keys == {f"bundle_emb.{word}.{ending}" for word in ("<sks>", "artsy") for ending in endings}
        beside = tmp_path / f"{family}.embeddings"
        assert {file.name for file in beside.iterdir()} == {"sks.safetensors", "artsy.safetensors"}


def test_diffusers_loads_the_word_from_its_own_file(trained, tmp_path):
    """`load_textual_inversion` is the judge of the separate file: the word, and its vectors."""
    base, source = trained["sd1"]
    convert_adapter(source, tmp_path / "a.safetensors", to="diffusers", base=base)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(base, local_files_only=True, safety_checker=None)
    folder = str(tmp_path / "a.embeddings")
    pipeline.load_textual_inversion(folder, weight_name="sks.safetensors", local_files_only=True)
    number = pipeline.tokenizer.convert_tokens_to_ids("<sks>")
    vector = pipeline.text_encoder.get_input_embeddings().weight[number]
    assert torch.equal(vector.detach(), AdapterFile.read(source).token_vectors("text_encoder")["<sks>"][0])


def test_diffusers_loads_words_of_two_encoders(trained, tmp_path):
    """For SDXL each encoder is given its own tensor, as diffusers' documentation has it."""
    base, source = trained["sdxl"]
    convert_adapter(source, tmp_path / "a.safetensors", to="diffusers", base=base)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(base, local_files_only=True)
    state = load_file(tmp_path / "a.embeddings" / "sks.safetensors")
    for key, encoder in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2")):
        model, reader = getattr(pipeline, encoder), getattr(pipeline, encoder.replace("text_encoder", "tokenizer"))
        pipeline.load_textual_inversion(state[key], token="<sks>", text_encoder=model, tokenizer=reader)
        vector = model.get_input_embeddings().weight[reader.convert_tokens_to_ids("<sks>")]
        assert torch.equal(vector.detach(), AdapterFile.read(source).token_vectors(encoder)["<sks>"][0])


def test_what_a_word_of_an_unusual_base_says_of_itself_counts(tmp_path):
    """Its width fits no published base, but its papers name the kind."""
    papers = {"modelspec.architecture": "stable-diffusion-v1/textual-inversion", "finetune.word": "<cat>"}
    save_file({"emb_params": noise(2, 128)}, tmp_path / "cat.safetensors", metadata=papers)
    adapter = read_adapter(tmp_path / "cat.safetensors")
    assert adapter.architecture.family == "sd1" and adapter.tokens["<cat>"]["text_encoder"].shape == (2, 128)
    save_file({"emb_params": noise(2, 128)}, tmp_path / "dog.safetensors")
    with pytest.raises(InterchangeError, match="does not say which kind of base"):
        read_adapter(tmp_path / "dog.safetensors")


def test_missing_words_are_missed(trained, tmp_path):
    """An adapter whose words were left behind is not read as if it never had any; nor is a file from elsewhere."""
    base, source = trained["sd1"]
    convert_adapter(source, tmp_path / "a.safetensors", to="diffusers", base=base)
    (tmp_path / "a.embeddings" / "artsy.safetensors").unlink()
    with pytest.raises(InterchangeError, match=r"'artsy' lies in .* which is missing"):
        read_adapter(tmp_path / "a.safetensors", base)
    tensors = load_file(tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.safetensors", metadata={"finetune.embeddings": '{"x": "../a/b.safetensors"}'})
    with pytest.raises(CheckpointError, match="not next to the adapter"):
        read_adapter(tmp_path / "b.safetensors", base)


def test_what_needs_no_words_goes_on_without_them_and_says_so(trained, tmp_path):
    """The layers of an adapter are whole without its words; `inspect` tells where those should lie."""
    base, source = trained["sd1"]
    lonely = tmp_path / "alone" / "a.safetensors"
    convert_adapter(source, lonely, to="diffusers", base=base)
    assert sum("is in" in note for note in inspect_file(lonely, base).notes) == 2
    shutil.rmtree(lonely.with_suffix(".embeddings"))
    assert sum("which is missing; sampling needs it" in note for note in inspect_file(lonely, base).notes) == 2
    done = convert_adapter(lonely, tmp_path / "k.safetensors", to="kohya", base=base)
    assert sum(note.startswith("left out: the learned word") for note in done.notes) == 2
    merged = merge_adapters([str(lonely), str(lonely)], tmp_path / "m.safetensors", settings={}, base=base)[1]
    assert sum(note.startswith("left out: the learned word") for note in merged.notes) == 2
    found = diff_adapters(lonely, source, base)
    assert found.cosine == pytest.approx(1) and len(found.notes) == 3


def test_what_a_run_says_of_itself_stays_in_other_layouts(trained, tmp_path):
    """Model managers show the trigger words, the base and the steps of a file."""
    base, source = trained["sd1"]
    wanted = AdapterFile.read(source).header
    for layout in ("kohya", "diffusers"):
        convert_adapter(source, tmp_path / f"{layout}.safetensors", to=layout, base=base)
        said = read_header(tmp_path / f"{layout}.safetensors").metadata
        assert said["modelspec.trigger_phrase"] == ", ".join(wanted.trigger_words)
        assert said["ss_sd_model_name"] == said["finetune.base"] == wanted.base
        assert said["ss_steps"] == said["finetune.step"] == str(wanted.step)


@pytest.mark.parametrize(("tensors", "family", "networks"), [
    ({"emb_params": noise(2, 768)}, "sd1", {"text_encoder"}),
    ({"<cat>": noise(2, 1024)}, "sd2", {"text_encoder"}),
    ({"clip_l": noise(2, 768), "clip_g": noise(2, 1280)}, "sdxl", {"text_encoder", "text_encoder_2"}),
    ({"string_to_param.*": noise(1, 768)}, "sd1", {"text_encoder"}),
    ({"<cat>": noise(768)}, "sd1", {"text_encoder"}),
])  # fmt: skip
def test_embeddings_of_other_programs_are_read(tensors, family, networks, tmp_path):
    """A textual inversion of A1111, kohya or diffusers becomes a file of this toolkit, for its kind of base."""
    source = write(tmp_path / "cat.safetensors", tensors)
    convert_adapter(source, tmp_path / "ours.safetensors", to="ours")
    file = AdapterFile.read(tmp_path / "ours.safetensors")
    assert file.header.family == family and file.header.tokens[0].strip("<>") == "cat"
    assert {encoder for encoder in networks if file.token_vectors(encoder)} == networks
    convert_adapter(tmp_path / "ours.safetensors", tmp_path / "k.safetensors", to="kohya")
    assert set(read_adapter(tmp_path / "k.safetensors").tokens[file.header.tokens[0]]) == networks
    with pytest.raises(UserError, match="contains only learned words"):
        convert_adapter(tmp_path / "k.safetensors", tmp_path / "d.safetensors", to="diffusers")


def test_a_word_with_a_dot_is_not_bundled(trained, tmp_path):
    """A1111 cuts the word at the first dot, so it would be another word."""
    base, source = trained["sd1"]
    file = AdapterFile.read(source)
    file.header = AdapterHeader(**{**vars(file.header), "tokens": ("v1.5", "artsy")})
    file.save(tmp_path / "dot.safetensors")
    with pytest.raises(InterchangeError, match=r"v1\.5"):
        convert_adapter(tmp_path / "dot.safetensors", tmp_path / "k.safetensors", to="kohya", base=base)
    convert_adapter(tmp_path / "dot.safetensors", tmp_path / "d.safetensors", to="diffusers", base=base)
    assert "v1.5" in read_adapter(tmp_path / "d.safetensors", base).tokens


def test_no_two_words_share_a_file():
    """`<cat>`, `cat` and `Cat` are three words; on many disks they would be one file."""
    names = file_names(["<cat>", "cat", "Cat", "cat-2", "v1.5", "<>"])
    assert list(names.values()) == [
        "cat.safetensors", "cat-2.safetensors", "Cat-3.safetensors", "cat-2-2.safetensors", "v1.5.safetensors",
        "word.safetensors",
    ]  # fmt: skip
