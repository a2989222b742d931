"""Captions in training: varied as asked, the trigger always there, each a pure function of its draw."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.captions import (
    PLAIN,
    CaptionRules,
    compose,
    draw_caption,
    every_caption,
    plain_caption,
    without_trigger,
)
from finetune.rng import python_rng

TAGS = "sks, red hat, beach, sunset, smile"


def texts(caption, rules, count=200):
    return {compose(caption, rules, python_rng(0, "test", i)) for i in range(count)}


def test_a_caption_without_rules_is_what_was_written():
    """Odd spacing, braces and commas are the user's."""
    for caption in ("a  photo, of {it}", "", "x,y", "{", "a | b", "[trigger]"):
        assert compose(caption, PLAIN, python_rng(0, "test")) == caption


def test_shuffled_tags_are_the_same_tags():
    """Every tag once, in other orders, the first ones where they are."""
    found = texts(TAGS, CaptionRules(shuffle=True, keep_tokens=1))
    assert len(found) == 24, "4! orders"
    for text in found:
        assert text.startswith("sks, ")
        assert sorted(text.split(", ")) == sorted(TAGS.split(", "))


def test_the_separator_can_be_chosen():
    """Captions of tags with commas in them."""
    found = texts("a, b; c", CaptionRules(shuffle=True, separator=";"))
    assert found == {"a, b; c", "c; a, b"}


def test_keep_separators_mark_what_stays():
    """Kohya's `|||`: what is before the first and behind the second stays, and the marks go."""
    found = texts("sks, dog ||| a, b ||| best", CaptionRules(shuffle=True))
    assert found == {"sks, dog, a, b, best", "sks, dog, b, a, best"}
    assert texts("sks ||| a", PLAIN) == {"sks, a"}, "the mark is no part of the text, shuffled or not"


def test_dropped_tags_are_never_kept_ones_nor_the_trigger():
    """A caption that lost its trigger would teach the subject to nobody's name."""
    rules = CaptionRules(tag_dropout=0.9, keep_tokens=1, trigger="sks")
    found = texts("a photo, red hat, one sks dog, beach", rules)
    assert {"a photo, one sks dog", "a photo, red hat, one sks dog"} <= found
    assert all(text.startswith("a photo") and "one sks dog" in text for text in found)


def test_tags_are_dropped_as_often_as_asked():
    """A share of 0.3 is 0.3."""
    rules = CaptionRules(tag_dropout=0.3)
    kept = [len(compose("a, b, c, d, e", rules, python_rng(0, "t", i)).split(", ")) for i in range(2000)]
    assert sum(kept) / 2000 == pytest.approx(3.5, abs=0.1)


def test_wildcards_choose_evenly_and_may_be_nested():
    """{a|b} is decided in every draw, innermost first; an empty option is nothing."""
    assert texts("a {red|blue} {small |}ball", PLAIN) == {
        "a red smallball", "a blue smallball", "a red ball", "a blue ball"
    }  # fmt: skip
    assert texts("{a {x|y}|b}", PLAIN) == {"a x", "a y", "b"}
    count = sum(compose("{a|b}", PLAIN, python_rng(0, "t", i)) == "a" for i in range(1000))
    assert 440 < count < 560


def test_the_placeholder_becomes_the_trigger():
    """One folder of captions serves any word."""
    assert compose("a [trigger] dog", CaptionRules(trigger="ohwx"), python_rng(0, "t")) == "a ohwx dog"


def test_prefix_and_suffix_are_never_shuffled_or_dropped():
    """They are put around last."""
    rules = CaptionRules(shuffle=True, tag_dropout=0.9, prefix="photo of sks,", suffix="high detail")
    for text in texts("a, b, c", rules):
        assert text.startswith("photo of sks,") and text.endswith("high detail")
    assert texts("", CaptionRules(prefix="sks")) == {"sks"}


RULES = st.builds(
    CaptionRules,
    shuffle=st.booleans(),
    keep_tokens=st.integers(0, 3),
    tag_dropout=st.sampled_from([0.0, 0.5]),
    prefix=st.sampled_from(["", "pre"]),
    trigger=st.sampled_from([None, "sks"]),
)
CAPTIONS = st.lists(st.text("abc ,|{}[]\u00e9\U0001f600", max_size=20), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(captions=CAPTIONS, rules=RULES, variants=st.integers(1, 5), draw=st.integers(0, 50))
def test_every_draw_is_among_the_texts_that_are_encoded(captions, rules, variants, draw):
    """With frozen text encoders a draw outside of the cache would stop the run; and a draw is repeatable."""
    allowed = every_caption(captions, rules, variants)
    assert len(allowed) <= len(captions) * variants
    text = draw_caption(captions, rules, python_rng(7, "caption", draw), variants)
    assert text in allowed
    assert text == draw_caption(captions, rules, python_rng(7, "caption", draw), variants)


def test_several_captions_take_turns():
    """One is drawn per epoch, evenly."""
    drawn = [draw_caption(["a", "b", "c"], PLAIN, python_rng(0, "caption", epoch), 1) for epoch in range(900)]
    assert all(250 < drawn.count(text) < 350 for text in "abc")


def test_trained_text_encoders_read_new_texts_without_a_bound():
    """Nothing is cached then, so nothing needs a bound."""
    rules = CaptionRules(shuffle=True)
    bound = {draw_caption([TAGS], rules, python_rng(0, "c", i), 2) for i in range(300)}
    free = {draw_caption([TAGS], rules, python_rng(0, "c", i), None) for i in range(300)}
    assert len(bound) == 2 and len(free) > 90


def test_validation_asks_with_the_caption_in_its_order():
    """A fixed question: nothing shuffled or dropped."""
    rules = CaptionRules(shuffle=True, tag_dropout=0.5, prefix="photo,", trigger="sks")
    assert plain_caption(["[trigger], a, b", "other"], rules) == "photo, sks, a, b"


def test_texts_without_the_trigger_are_found_in_every_variant():
    """One of two options without the word would teach the subject namelessly half of the time."""
    rules = CaptionRules(trigger="sks")
    assert without_trigger(["a {sks|ohwx} dog"], rules, 16) == ["a ohwx dog"]
    assert without_trigger(["a sks dog", "[trigger] {red|blue}"], rules, 16) == []
    assert without_trigger(["a dog"], replace(rules, prefix="sks"), 16) == []
