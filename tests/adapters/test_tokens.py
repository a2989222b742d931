"""Learned words: only their vectors change, and every reader spells them the same."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune.adapters import AdapterFile, attach
from finetune.config import AdapterConfig, TextAdapterConfig, TokensConfig
from finetune.errors import CheckpointError, ConfigError
from finetune.families.text import spelled_out
from finetune.run_files import make_run
from finetune.sampling.apply import adapter_applied
from finetune.sampling.generate import generate
from finetune.tracking import read_metrics
from finetune.training.build_adapters import build_targets, build_words
from finetune.training.model import TrainableModel
from finetune.training.trainer import train
from tests.conftest import command
from tests.test_contract import Bench

WORDS = {"<bot>": "toy cat", "<hill>": "hill"}


class Learner(Bench):
    """A twin that learns words, alone or beside adapters."""

    def __init__(self, family="sd1", *, adapter=None, text=None, **tokens):
        super().__init__(family, "", attached=False)
        config = TokensConfig(words=WORDS, **tokens)
        targets, problems = build_targets(adapter, text, 1e-3, self.family, self.parts)
        words, more = build_words(config, 1e-3, self.parts)
        assert not problems + more
        self.adapters = attach(targets, 0, words)
        self.ask("a <bot> on a <hill>", "a cat")

    def ask(self, *prompts):
        self.inputs = (*self.inputs[:3], self.family.tokenize(self.parts.tokenizers, list(prompts)), self.inputs[4])


ENCODERS = [None, TextAdapterConfig(rank=4), TextAdapterConfig(method="full", targets=r".*self_attn\.q_proj")]


@pytest.mark.parametrize("text", ENCODERS, ids=["frozen", "lora", "full"])
def test_only_the_new_rows_change(text):
    """The embedding table of a million others must stay as it is to the bit; every new vector must move."""
    bench = Learner(text=text, adapter=AdapterConfig(rank=4))
    encoder = bench.parts.text_encoders["text_encoder"]
    table = encoder.get_input_embeddings().base_layer.weight
    before, state = table.clone(), bench.adapters.state()
    optimizer = torch.optim.AdamW(bench.adapters.parameter_groups(), weight_decay=0.1)
    for _ in range(2):
        bench.predict(grad=True).square().mean().backward()
        optimizer.step()
    assert torch.equal(table, before) and table.grad is None
    vectors = {name for name in state if "token_embedding." in name}
    assert vectors == {"text_encoder.token_embedding.0", "text_encoder.token_embedding.1"}
    named = bench.adapters.named_parameters()
    assert all((named[name] != state[name]).any(dim=1).all() for name in vectors)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_words_start_as_their_ordinary_words(family):
    """Training starts from what the initial words say, and the base stays what it says to others."""
    bench = Learner(family)
    learned = bench.predict()
    bench.ask("a toy cat on a hill", "a cat")
    if not bench.family.t5_tokens:  # T5 has another number of tokens for the same words, and a mark before each
        torch.testing.assert_close(learned, bench.predict())
    plain = Bench(family, "", attached=False)
    plain.inputs = bench.inputs
    assert torch.equal(plain.predict(), bench.predict())
    assert {name.partition(".")[0] for name in bench.adapters.named_parameters()} == set(bench.parts.text_encoders)


def test_switched_off_a_word_means_what_it_started_from():
    """The base that validation compares with knows no better."""
    bench = Learner()
    start = bench.predict()
    bench.disturb()
    assert not torch.equal(bench.predict(), start)
    with bench.adapters.disabled():
        assert torch.equal(bench.predict(), start)


@pytest.mark.parametrize(("vectors", "rows"), [(1, "mean"), (2, "each"), (5, "repeated")])
def test_vectors_and_starting_words_need_not_be_as_many(vectors, rows):
    """Fewer vectors than tokens: means of shares; more: repeated in order."""
    bench = Learner(vectors=vectors)
    encoder, tokenizer = bench.parts.text_encoders["text_encoder"], bench.parts.tokenizers["text_encoder"]
    ids = tokenizer("toy cat", add_special_tokens=False).input_ids
    toy, cat = encoder.get_input_embeddings().base_layer.weight[ids]
    wanted = {"mean": [(toy + cat) / 2], "each": [toy, cat], "repeated": [toy, cat, toy, cat, toy]}[rows]
    torch.testing.assert_close(bench.adapters.state()["text_encoder.token_embedding.0"], torch.stack(wanted))


def test_a_word_takes_as_many_places_as_it_has_vectors():
    """In the middle of a sentence, at a comma, in any case the tokenizer folds."""
    bench = Learner(vectors=3)
    tokenizer = bench.parts.tokenizers["text_encoder"]
    first = tokenizer.convert_tokens_to_ids("<bot>")
    ids = bench.family.tokenize(bench.parts.tokenizers, ["a <bot>, seen from <hill>"])["text_encoder"][0].tolist()
    assert [i for i in ids if i >= first] == list(range(first, first + 6))
    assert spelled_out(tokenizer, ["a <bot>"]) == ["a <bot> <bot>_1 <bot>_2"]


@pytest.mark.parametrize("text", [None, TextAdapterConfig(rank=4)], ids=["frozen", "lora"])
def test_a_file_with_words_says_the_same(tmp_path, text):
    """Saved, read and applied to a plain base: what was trained; afterwards base and tokenizer are as before."""
    bench = Learner(text=text, vectors=2).disturb()
    wanted = bench.predict()
    bench.file().save(tmp_path / "adapter.safetensors")
    file = AdapterFile.read(tmp_path / "adapter.safetensors")
    assert file.header.tokens == tuple(WORDS)
    assert file.header.method == ({} if text is None else {"text_encoder": "lora"})
    plain = Bench("sd1", "", attached=False)
    own, size = plain.parts.tokenizers["text_encoder"], len(plain.parts.tokenizers["text_encoder"])
    with adapter_applied(plain.family, plain.parts, file):
        tokens = plain.family.tokenize(plain.parts.tokenizers, ["a <bot> on a <hill>", "a cat"])
        plain.inputs = (*plain.inputs[:3], tokens, plain.inputs[4])
        torch.testing.assert_close(plain.predict(), wanted, rtol=1e-4, atol=1e-5)
    assert plain.parts.tokenizers["text_encoder"] is own and len(own) == size
    assert type(plain.parts.text_encoders["text_encoder"].get_input_embeddings()) is torch.nn.Embedding


def test_pictures_are_drawn_with_the_words(tmp_path):
    """diffusers' pipeline spells several vectors out by itself; ours must not do it twice."""
    bench = Learner(vectors=2)
    base = Bench("sd1", "", attached=False)
    with torch.no_grad():
        bench.adapters.named_parameters()["text_encoder.token_embedding.0"].add_(1.0)
    settings = {"seeds": [0], "steps": 2, "height": 64, "width": 64}
    live = generate(bench.family, bench.parts, ["a <bot>"], **settings)[0]
    read = generate(base.family, base.parts, ["a <bot>"], adapters=[(bench.file(), 1.0)], **settings)[0]
    plain = generate(base.family, base.parts, ["a toy cat"], **settings)[0]
    assert list(live.getdata()) == list(read.getdata())
    assert list(live.getdata()) != list(plain.getdata())


def test_the_end_of_a_prompt_is_found_behind_a_word():
    """CLIP configurations with a wrong end mark pool the highest number, which a new word would be."""
    bench = Learner("sdxl")
    bench.ask("a <bot> on a hill", "a cat")
    with_word = bench.family.encode_prompts(bench.parts.text_encoders, bench.inputs[3])
    bench.ask("a toy cat on a hill", "a cat")
    plain = bench.family.encode_prompts(bench.parts.text_encoders, bench.inputs[3])
    for name in plain:
        torch.testing.assert_close(with_word[name], plain[name])


def test_lengths_are_pulled_to_the_vocabularys():
    """v (m / |v|)^p: with p = 1 every vector has the mean length at once, and only where it still moves."""
    bench = Learner(norm_pull=1.0).disturb()
    table = bench.parts.text_encoders["text_encoder"].get_input_embeddings().base_layer.weight
    bench.adapters.after_step({})
    vectors = bench.adapters.named_parameters()["text_encoder.token_embedding.0"]
    mean = table.norm(dim=1).mean()
    assert not torch.allclose(vectors.norm(dim=1), mean, rtol=1e-3)
    bench.adapters.after_step(bench.adapters.named_parameters())
    torch.testing.assert_close(vectors.norm(dim=1), mean.expand(2), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ({"words": {"bot": "toy"}}, "tokens.words.bot"),
        ({"words": {"<Bot>": "toy"}}, "tokens.words.<Bot>"),
        ({"words": {"<bot>": " "}}, "tokens.words.<bot>"),
        ({"words": {}}, "tokens.words"),
        ({"words": {"<dog>": "toy"}}, "which is not in data.caption_template='a <bot>'"),
    ],
)
def test_words_that_cannot_be_learned_are_refused(document, tokens, expected):
    """A word that may be a part of another, or that no caption holds, would be learned from noise."""
    data = document["data"] | {"captions": "template", "caption_template": "a <bot>", "trigger": None}
    with pytest.raises(ConfigError) as caught:
        make_run(document | {"tokens": tokens, "data": data})
    assert expected in caught.value.text()


def test_class_pictures_may_not_show_the_word(document):
    """It would learn the ordinary class."""
    data = document["data"] | {"prior": {"prompts": ["a <bot>"]}}
    with pytest.raises(ConfigError, match="it would learn the ordinary class"):
        make_run(document | {"tokens": {"words": {"<bot>": "toy"}}, "data": data})


def test_words_the_base_has_and_encoders_it_lacks_are_refused():
    """Refused by name, before anything is trained."""
    parts = copy.deepcopy(Bench("sd1", "", attached=False).parts)
    parts.tokenizers["text_encoder"].add_tokens(["<bot>"])
    _, problems = build_words(TokensConfig(words=WORDS), 1e-3, parts)
    assert problems == ["tokens.words: <bot> is a token of the base already; choose another word"]
    _, problems = build_words(TokensConfig(words=WORDS, text_encoders=("text_encoder_2",)), 1e-3, parts)
    assert problems == [
        "tokens.text_encoders names text_encoder_2; choose some of text_encoder, or null for all"
    ]


def test_words_of_another_base_are_refused():
    """Vectors of another width cannot stand beside the base's."""
    file = Learner().file()
    file.tensors = {name: torch.cat([tensor, tensor], 1) for name, tensor in file.tensors.items()}
    plain = Bench("sd1", "", attached=False)
    with pytest.raises(CheckpointError, match="has vectors of 64 numbers"), adapter_applied(
        plain.family, plain.parts, file
    ):
        pass


def test_captions_without_the_word_are_named(document, tmp_path, capsys, monkeypatch):
    """Sidecar captions of a subject that never say its word teach nothing."""
    document |= {"adapter": None, "text_encoder_adapter": None, "tokens": {"words": {"<bot>": "toy"}}}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(document))
    assert "no caption holds <bot>" in command(capsys, monkeypatch, "train", path, expect=3)


def test_every_learning_rate_is_told():
    """Words learn ten to a hundred times faster than the adapter beside them; one number would be wrong for one."""
    assert Learner().adapters.told_rates() == "0.001"
    bench = Learner(adapter=AdapterConfig(rank=4, lora_plus_ratio=16), learning_rate=0.03)
    assert bench.adapters.told_rates() == "0.001 to 0.016 for unet, 0.03 for words"
    assert bench.adapters.rates() == {"unet": [0.001, 0.016], "words": [0.03]}


def test_the_log_has_the_rate_of_words_beside_the_adapters(document, tmp_path):
    """metrics.jsonl is what curves are drawn from."""
    document |= {
        "adapter": {"rank": 2}, "tokens": {"words": {"<bot>": "toy"}, "learning_rate": 0.03},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0},
        "train": {"steps": 1, "batch_size": 1, "log_every": 1, "trackers": []},
    }  # fmt: skip
    document["data"] |= {"captions": "template", "caption_template": "a <bot>", "trigger": None}
    train(make_run(document))
    line = read_metrics(Path(document["output_dir"]) / "metrics.jsonl")[-1]
    assert (line["learning_rate"], line["learning_rate/unet"], line["learning_rate/words"]) == (1e-3, 1e-3, 0.03)


def test_the_model_with_words_is_one_module_for_ddp():
    """Every trained vector must be a parameter of the module that DDP wraps."""
    bench = Learner()
    whole = TrainableModel(bench.family, bench.parts.denoiser, bench.parts.text_encoders)
    held = {id(p) for p in whole.parameters() if p.requires_grad}
    assert held == {id(p) for p in bench.adapters.named_parameters().values()}


def word_file(value, *, word="<bot>", vectors=1):
    """An adapter of one learned word for the tiny SD1."""
    file = Learner(vectors=vectors).file()
    tensors = {"text_encoder.token_embedding.0": file.tensors["text_encoder.token_embedding.0"] + value}
    return AdapterFile(tensors, replace(file.header, tokens=(word,)))


def test_words_of_several_files_go_together():
    """Each means what its own file taught it, whichever is put on first; afterwards the base is as before."""
    plain = Bench("sd1", "", attached=False)
    encoder, own = plain.parts.text_encoders["text_encoder"], plain.parts.tokenizers["text_encoder"]
    one, two = word_file(1.0), word_file(2.0, word="<hill>", vectors=2)
    with adapter_applied(plain.family, plain.parts, one), adapter_applied(plain.family, plain.parts, two):
        ids = plain.parts.tokenizers["text_encoder"].convert_tokens_to_ids(["<bot>", "<hill>", "<hill>_1"])
        found = encoder.get_input_embeddings()(torch.tensor(ids))
    torch.testing.assert_close(found, torch.cat([*one.tensors.values(), *two.tensors.values()]))
    assert plain.parts.tokenizers["text_encoder"] is own
    assert type(encoder.get_input_embeddings()) is torch.nn.Embedding


def test_the_same_word_twice_is_taken_once_or_refused():
    """A run's own file and its half precision export hold one word; two meanings of a word cannot both be drawn."""
    plain = Bench("sd1", "", attached=False)
    first, rounded = word_file(1.0), word_file(1.0)
    rounded.tensors = {name: tensor.half().float() for name, tensor in rounded.tensors.items()}
    with adapter_applied(plain.family, plain.parts, first):
        knowing = len(plain.parts.tokenizers["text_encoder"])
        with adapter_applied(plain.family, plain.parts, rounded):
            assert len(plain.parts.tokenizers["text_encoder"]) == knowing
        for other in (word_file(1.5), word_file(1.0, vectors=2)):
            with pytest.raises(CheckpointError, match="<bot> means one thing in one adapter and another in the next"), (
                adapter_applied(plain.family, plain.parts, other)
            ):
                pass
