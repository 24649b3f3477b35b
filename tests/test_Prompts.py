"""The grammar of prompts."""

import math

import pytest

import Prompts
from ImbalancedCIFAR10 import CIFAR10_CLASSES
from Prompts import PROMPTS, find_grammar, fingerprint_of_prompts, make_prompts, with_article


def count_prompts(class_name):
    """Number of combinations of words in the grammar of a class."""
    _, fields = find_grammar(class_name)
    return math.prod(map(len, fields.values()))


@pytest.mark.parametrize("class_name", CIFAR10_CLASSES)
def test_every_class_has_thousands_of_different_prompts(class_name):
    assert count_prompts(class_name) > 50_000
    prompts = make_prompts(class_name, 5000)
    assert len(set(prompts)) == 5000
    assert all(p.isascii() and "{" not in p and "  " not in p for p in prompts)
    # CLIP reads 77 tokens, about four letters each.
    assert max(map(len, prompts)) < 200


@pytest.mark.parametrize("class_name", CIFAR10_CLASSES)
def test_every_word_is_used(class_name):
    text = " ".join(make_prompts(class_name, 2000))
    _, fields = find_grammar(class_name)
    assert [w for words in fields.values() for w in words if w not in text] == []


def test_a_larger_count_only_adds_and_another_seed_draws_others():
    assert make_prompts("cat", 300)[:100] == make_prompts("cat", 100)
    assert len(set(make_prompts("cat", 300, seed=0)) & set(make_prompts("cat", 300, seed=1))) < 10


def test_the_references_sentence_is_a_grammar():
    prompts = make_prompts("cat", 4950, grammar="reference")
    assert len(set(prompts)) == 4950
    _, fields = find_grammar("cat", "reference")
    words = prompts[0].split()
    assert (words[0], words[-2]) == ("A", "the")
    assert "cat" in words and words[-1] in fields["furniture"]


def test_a_class_is_added_with_one_entry(monkeypatch):
    entry = {"kind": ("a plains zebra", "a foal", "a foal"), "pose": ("grazing",), "scene": ("in the sun",)}
    monkeypatch.setitem(PROMPTS, "zebra", entry)
    assert count_prompts("zebra") == 2 * count_prompts("cat") // len(
        PROMPTS["cat"]["kind"] * len(PROMPTS["cat"]["pose"]) * len(PROMPTS["cat"]["scene"])
    )
    assert {"plains zebra grazing in the sun" in p for p in make_prompts("zebra", 100)} == {True, False}


def test_prompts_repeat_only_when_all_were_used(monkeypatch):
    # Two combinations read the same: "a b c" is drawn once.
    monkeypatch.setitem(PROMPTS, "x", {"template": "{u} {v}", "u": ("a", "a b"), "v": ("b c", "c")})
    prompts = make_prompts("x", 7)
    assert sorted(prompts[:3]) == ["a b b c", "a b c", "a c"]
    assert prompts[3:] == [*prompts[:3], prompts[0]]


def test_the_fingerprint_follows_the_words(monkeypatch):
    before = fingerprint_of_prompts("cat")
    assert before == fingerprint_of_prompts("cat") != fingerprint_of_prompts("cat", "reference")
    monkeypatch.setitem(PROMPTS, "cat", PROMPTS["cat"] | {"scene": ("on the moon",)})
    assert fingerprint_of_prompts("cat") != before


@pytest.mark.parametrize(
    ("class_name", "grammar", "message"),
    [
        ("zebra", "varied", r"no 'varied' prompts for the class 'zebra'.*add an entry"),
        ("dog", "reference", r"no 'reference' prompts for the class 'dog'.*use the prompts 'varied'"),
        ("cat", "long", "Unknown prompts 'long'. Choose one of varied, reference"),
        ("empty", "varied", r"'empty' have the template .* no words for \{pose\}"),
        ("text", "varied", r"no words for \{kind\}: give its entry a tuple"),
    ],
)
def test_missing_prompts_are_named(class_name, grammar, message, monkeypatch):
    monkeypatch.setitem(PROMPTS, "empty", {"kind": ("a thing",), "pose": (), "scene": ("here",)})
    monkeypatch.setitem(PROMPTS, "text", {"kind": "a thing", "pose": ("lying",), "scene": ("here",)})
    with pytest.raises(ValueError, match=message):
        make_prompts(class_name, 3, grammar=grammar)
    assert "dog" not in Prompts.REFERENCE_PROMPTS


@pytest.mark.parametrize("class_name", ["", "  ", None, 3])
def test_a_class_without_a_name_has_no_article(class_name):
    with pytest.raises(ValueError, match="A class needs a name for the prompt, such as 'cat'"):
        with_article(class_name)
    assert with_article("otter") == "an otter"
    assert with_article("Airplane") == "an Airplane"


def test_a_negative_number_of_prompts_is_refused():
    with pytest.raises(ValueError, match="must not be negative: got -1"):
        make_prompts("cat", -1)
    assert make_prompts("cat", 0) == []
