"""What is done to captions, how long they are, and which words they share."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_tools.errors import UsageError
from data_tools.identity import identity_warning, shared_words
from data_tools.report.tokens import Tokenizer, load_tokenizers
from data_tools.tokens import at_least, lost_end
from data_tools.wording import Wording
from tests.conftest import ROOT
from tests.data_tools.test_data_cli import flat, run

__all__ = ["run"]

BASE = ROOT / "finetune/demo/base"
EXACT = next(iter(load_tokenizers(str(BASE)).values()))


@pytest.mark.parametrize(
    "wording, before, after",
    [
        (Wording(without=("red",)), "a Red dog, red, in redwood", "a dog, in redwood"),
        (Wording(without=("long hair", "1girl")), "1girl, long  hair, smile", "smile"),
        (Wording(without=("dog",)), "dog", ""),
        (Wording(without=("red", "red  hair")), "a woman, red hair, red dress", "a woman, dress"),
        (Wording(rewords=(("dog", r"sks \1 dog"),)), "a dog. Dogs", r"a sks \1 dog. Dogs"),
        (Wording(rewords=(("dog", "cat"),), without=("cat",)), "a dog, here", "a, here"),
        (Wording(trigger="sks dog"), "on grass", "sks dog, on grass"),
        (Wording(trigger="sks dog"), "a SKS  dog on grass", "a SKS  dog on grass"),
        (Wording(trigger="sks"), "", "sks"),
        (Wording(prefix="photo of ", suffix=", 8k", trigger="sks"), "a dog", "sks, photo of a dog, 8k"),
        (Wording(), " a ,, b ", "a ,, b"),
    ],
)
def test_wording(wording, before, after):
    """Whole words in any case; tidy commas; the trigger once."""
    assert wording(before) == after


@given(st.text(), st.lists(st.text(min_size=1).filter(str.strip), max_size=3))
def test_no_caption_breaks_the_wording(caption, words):
    """Whatever the caption and the words: one line, never longer, and a word alone leaves nothing."""
    wording = Wording(without=tuple(words))
    line = " ".join(caption.split())
    assert len(wording(line)) <= len(line) and "\n" not in wording(line)
    assert all(wording(word.strip()) == "" for word in words)


@pytest.mark.parametrize("options", [{"trigger": ""}, {"without": (" ",)}, {"prefix": "a\nb"}, {"suffix": "\x1b"}])
def test_wordings_that_cannot_be_followed_are_refused(options):
    """An empty word would match everywhere; a line break would make two captions."""
    with pytest.raises(UsageError):
        Wording(**options)


def test_shared_words_are_counted_once_for_each_picture():
    """With two captions a word does not count twice; words that are meant to be everywhere are not told."""
    captions = {str(n): ("sks dog with brown fur", "brown dog") for n in range(4)} | {"x": ("a cat",)}
    assert shared_words(captions, ("sks dog",)) == [("brown", 0.8), ("fur", 0.8)]
    warning = identity_warning(captions, "sks dog")
    assert warning is not None and "brown 80%, fur 80%" in str(warning) and "--without 'brown'" in str(warning)
    assert identity_warning({"a": ("brown",), "b": ("brown",)}, "sks") is None, "two pictures are no statistic"


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=60))
def test_without_a_tokenizer_the_count_is_never_too_high(caption):
    """It is called a lower bound; checked against a real CLIP tokenizer with another vocabulary."""
    (bound,) = at_least().values()
    ascii_only = caption.encode("ascii", "ignore").decode()
    assert bound.count(ascii_only) <= EXACT.count(ascii_only)


def test_what_falls_off_is_exactly_the_words_behind_the_last_that_fits():
    """One word more would not fit."""
    caption = " ".join(f"word{number}" for number in range(40))
    lost = lost_end(caption, EXACT)
    read = caption[: len(caption) - len(lost)]
    assert read + lost == caption and EXACT.count(read.strip()) <= EXACT.room
    assert EXACT.count(read + lost.split()[0]) > EXACT.room
    assert lost_end("short", EXACT) == ""
    assert lost_end("one two", Tokenizer(lambda text: 9, 5)) == "one two"
    assert len(AutoTokenizer.from_pretrained(BASE / "tokenizer")(caption).input_ids) == EXACT.count(caption)


def test_tokens_command_shows_what_falls_off(run, tmp_path, save):
    """Exact with a tokenizer, honest without; an exit code for CI."""
    long = ", ".join(["big red dog on grass"] * 20) + " THE END"
    save("a.png", tint=1, caption=long)
    save("b.png", tint=2, caption="short")
    rough = run("tokens", tmp_path)
    assert rough.returncode == 0 and "A lower bound" in rough.stdout and "THE END" in flat(rough.stdout)
    save("c.png", tint=3, caption="word " * 5000)
    assert len(run("tokens", tmp_path).stdout) < 5000, "one endless caption does not hide the others"
    (tmp_path / "c.png").unlink()
    exact = run("tokens", tmp_path, "--tokenizer", "demo", "--strict")
    assert exact.returncode == 3 and "A lower bound" not in exact.stdout and "1 caption is cut" in exact.stderr
    document = json.loads(run("tokens", tmp_path, "--tokenizer", BASE, "--json").stdout)
    assert document["exact"] and [bool(each["lost"]) for each in document["captions"]] == [True, False]
    assert run("tokens", tmp_path, "--tokenizer", "./nowhere").returncode == 2
