"""The prompts for Stable Diffusion: a grammar for each class, and prompts drawn from it.

    make_prompts("cat", 4950, seed=0)     # 4,950 different prompts; a larger count only adds more

To add a class of your own, add one entry: the kinds of things in it, what they do, and where.

    PROMPTS["zebra"] = {
        "kind": ("a plains zebra", "a zebra foal"),
        "pose": ("grazing", "running", "standing still"),
        "scene": ("in tall grass", "at a water hole", "on a dusty road"),
    }

Fields that an entry leaves out (medium, view, light, template) come from ``SHARED``. Prompts that differ in
kind, pose, scene, view and light give training images that differ too. Class names alone give one typical
picture again and again (Sariyildiz et al. 2023, Fake it till you make it).
"""

import hashlib
import json
import math
from string import Formatter

import numpy as np

from Repeatability import derive_seed

# Only photographs, because the test images are photographs. Drawings would teach another domain.
SHARED = {
    "template": "{medium} of {kind} {pose} {scene}, {view}, {light}",
    "medium": ("a photo", "an amateur snapshot", "a close-up photo", "a documentary photo", "a phone picture"),
    "view": (
        "seen from the front", "seen from the side", "seen from behind", "at a three-quarter angle",
        "seen from slightly above", "seen from a low angle",
    ),
    "light": (
        "in bright daylight", "under an overcast sky", "in warm evening light", "in soft morning light",
        "with a camera flash", "in deep shade",
    ),
}  # fmt: skip

PROMPTS = {
    "airplane": {
        "kind": (
            "a passenger jet", "a jumbo jet", "a small propeller plane", "a fighter jet", "a biplane",
            "a business jet", "a seaplane", "a glider", "a military transport plane", "a turboprop airliner",
        ),
        "pose": ("taking off", "landing", "flying", "banking", "taxiing", "parked"),
        "scene": (
            "against a clear blue sky", "above the clouds", "on a runway", "over the sea", "over mountains",
            "at an airport gate", "on a grass airfield", "in front of a hangar",
        ),
    },
    "automobile": {
        "kind": (
            "a small hatchback", "a family sedan", "a station wagon", "a convertible", "a sports car",
            "an off-road car", "a vintage car", "a red car", "a white taxi", "a black limousine",
            "a police car", "a compact electric car",
        ),
        "pose": ("parked", "driving", "turning", "waiting", "standing with its headlights lit"),
        "scene": (
            "on a city street", "on a country road", "in a car park", "in front of a house", "on a highway",
            "in a showroom", "on a gravel drive", "beside a forest", "on a wet road",
        ),
    },
    "bird": {
        "kind": (
            "a sparrow", "a robin", "a pigeon", "a parrot", "an ostrich", "a duck", "a hen", "an owl",
            "a crow", "a gull", "a hummingbird", "an emu", "a blue tit", "a finch", "a heron", "a wren",
        ),
        "pose": ("perching", "standing", "flying", "looking around", "feeding", "spreading its wings", "walking"),
        "scene": (
            "on a branch", "on the grass", "on a fence", "near water", "against the sky", "on a roof",
            "in a hedge", "on sand", "on a feeder",
        ),
    },
    "cat": {
        "kind": (
            "a tabby cat", "a black cat", "a white cat", "a ginger cat", "a calico cat", "a Siamese cat",
            "a Persian cat", "a Maine Coon cat", "a British Shorthair cat", "a Russian Blue cat",
            "a Bengal cat", "a Sphynx cat", "a kitten", "a grey kitten", "a long-haired cat",
            "a black and white cat",
        ),
        "pose": (
            "sitting", "lying down", "sleeping", "standing", "walking", "stretching", "crouching",
            "looking at the camera", "yawning",
        ),
        "scene": (
            "on a sofa", "on a carpet", "on the grass", "on a windowsill", "on a wooden floor", "on a bed",
            "in a cardboard box", "on a wall", "in a garden", "on a kitchen chair", "in someone's arms",
        ),
    },
    "deer": {
        "kind": (
            "a red deer stag", "a roe deer", "a fallow deer", "a white-tailed deer", "a mule deer", "a fawn",
            "a doe", "an elk", "a moose", "a reindeer", "a sika deer",
        ),
        "pose": ("standing", "grazing", "running", "lying down", "looking at the camera", "leaping", "drinking"),
        "scene": (
            "in a forest", "on a meadow", "in tall grass", "at the edge of a wood", "in snow", "beside a stream",
            "on a hillside", "in autumn leaves", "on a road",
        ),
    },
    "dog": {
        "kind": (
            "a Labrador dog", "a German shepherd dog", "a golden retriever dog", "a beagle dog", "a poodle dog",
            "a bulldog", "a dachshund dog", "a border collie dog", "a husky dog", "a chihuahua dog",
            "a terrier dog", "a spaniel dog", "a pug dog", "a puppy", "a mixed-breed dog", "a boxer dog",
        ),
        "pose": (
            "sitting", "lying down", "standing", "running", "walking on a lead", "playing with a ball",
            "looking at the camera", "panting", "sleeping",
        ),
        "scene": (
            "on the grass", "on a beach", "on a sofa", "on a carpet", "in a park", "on a pavement", "in snow",
            "in a garden", "on a wooden floor", "in a kennel",
        ),
    },
    "frog": {
        "kind": (
            "a green tree frog", "a common frog", "a bullfrog", "a toad", "a red-eyed tree frog",
            "a poison dart frog", "a brown frog", "a leopard frog", "a spadefoot toad", "a small frog",
        ),
        "pose": ("sitting", "crouching", "jumping", "clinging", "resting", "peering out"),
        "scene": (
            "on a leaf", "on wet stones", "in a pond", "on a hand", "on moss", "on a log", "in the mud",
            "on sand", "in leaf litter", "on a white background",
        ),
    },
    "horse": {
        "kind": (
            "a brown horse", "a white horse", "a black horse", "a chestnut horse", "a grey horse",
            "a pinto horse", "a pony", "a foal", "an Arabian horse", "a draft horse", "a palomino horse",
        ),
        "pose": (
            "standing", "grazing", "galloping", "trotting", "being ridden", "pulling a cart", "jumping a fence",
            "looking over a gate",
        ),
        "scene": (
            "on a meadow", "in a paddock", "in front of a stable", "on a beach", "in a riding arena",
            "on a dirt road", "in snow", "in a forest clearing", "at a show",
        ),
    },
    "ship": {
        "kind": (
            "a cargo ship", "a container ship", "a cruise ship", "a sailing ship", "a fishing boat",
            "a ferry", "a warship", "a tugboat", "an oil tanker", "a motor yacht", "a speedboat", "a sailing yacht",
        ),
        "pose": ("sailing", "anchored", "moored", "turning", "passing by"),
        "scene": (
            "on a calm sea", "on rough water", "in a harbour", "on a river", "near a rocky coast",
            "at a container terminal", "under a bridge", "on the horizon", "beside a pier", "among ice floes",
        ),
    },
    "truck": {
        "kind": (
            "a lorry", "a semi-trailer truck", "a dump truck", "a fire engine", "a garbage truck",
            "a delivery truck", "a tanker truck", "a tow truck", "a flatbed truck", "a concrete mixer truck",
            "a log truck", "a moving van", "a vintage truck",
        ),
        "pose": ("parked", "driving", "being loaded", "turning", "waiting"),
        "scene": (
            "on a highway", "on a city street", "in a truck stop", "at a construction site", "on a dirt road",
            "in front of a warehouse", "on a farm", "at a loading dock", "in a car park",
        ),
    },
}  # fmt: skip

# The sentence is the reference study's. The words that fill its fields are ours.
REFERENCE_PROMPTS = {
    "cat": {
        "template": "A {breed} cat {action} {preposition} the {furniture}",
        "breed": (
            "tabby", "Siamese", "Persian", "Maine Coon", "Bengal", "Ragdoll", "Sphynx", "British Shorthair",
            "Abyssinian", "Birman", "Russian Blue", "Scottish Fold", "Burmese", "Norwegian Forest", "Himalayan",
        ),
        "action": (
            "sitting", "sleeping", "lying", "standing", "playing", "stretching", "hiding", "jumping", "walking",
            "resting",
        ),
        "preposition": ("on", "under", "beside", "in front of", "behind", "near"),
        "furniture": (
            "sofa", "bed", "table", "chair", "armchair", "desk", "bookshelf", "carpet", "cupboard", "bench",
        ),
    },
}  # fmt: skip

GRAMMARS = {"varied": PROMPTS, "reference": REFERENCE_PROMPTS}


def find_grammar(class_name, grammar="varied"):
    """Return the complete entry of a class: its template, and the words of each field.

    Parameters
    ----------
    class_name : str
    grammar : {'varied', 'reference'}
        ``'varied'`` has the ten classes of CIFAR-10. ``'reference'`` is the reference study's and has cats
        only.

    Returns
    -------
    template : str
    fields : dict
        Field of the template -> tuple of its words, each once.

    Raises
    ------
    ValueError
        For an unknown grammar, a class without prompts, or an entry that lacks the words of a field.
    """
    if grammar not in GRAMMARS:
        raise ValueError(f"Unknown prompts {grammar!r}. Choose one of {', '.join(GRAMMARS)}.")
    entries = GRAMMARS[grammar]
    if class_name not in entries:
        others = [name for name, e in GRAMMARS.items() if class_name in e]
        advice = (
            f"use the prompts {others[0]!r}" if others else "add an entry for it to PROMPTS in Prompts.py"
        )
        raise ValueError(
            f"There are no {grammar!r} prompts for the class {class_name!r}, only for "
            f"{', '.join(entries)}: {advice}."
        )
    entry = SHARED | entries[class_name]
    template = entry["template"]
    fields = {}
    for _, name, _, _ in Formatter().parse(template):
        if name is None:
            continue
        words = entry.get(name, ())
        if isinstance(words, str) or not words:
            raise ValueError(
                f"The prompts of {class_name!r} have the template {template!r}, but no words for "
                f"{{{name}}}: give its entry a tuple of them."
            )
        fields[name] = tuple(dict.fromkeys(words))
    return template, fields


def with_article(class_name):
    """Return a class name with its article, such as ``a cat`` or ``an airplane``, for use in a prompt.

    Raises
    ------
    ValueError
        If the name is no text, or empty.
    """
    if not isinstance(class_name, str) or not class_name.strip():
        raise ValueError(f"A class needs a name for the prompt, such as 'cat': got {class_name!r}.")
    return f"{'an' if class_name[0].lower() in 'aeiou' else 'a'} {class_name}"


def fingerprint_of_prompts(class_name, grammar="varied"):
    """Return a short hash (str) of a class's template and words. It changes when any of them changes."""
    text = json.dumps(find_grammar(class_name, grammar))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def make_prompts(class_name, count, seed=0, grammar="varied"):
    """Draw prompts without repetition.

    Parameters
    ----------
    class_name : str
    count : int
        Number of prompts. A larger count starts with the same prompts. The list starts over only after every
        prompt of the grammar was used; the same words with another seed still give another image.
    seed : int
        Decides which prompts are drawn, and in which order.
    grammar : {'varied', 'reference'}
        See :func:`find_grammar`.

    Returns
    -------
    list of str, length ``count``

    Raises
    ------
    ValueError
        If ``count`` is negative. See also :func:`find_grammar`.
    """
    if count < 0:
        raise ValueError(f"The number of prompts must not be negative: got {count}.")
    template, fields = find_grammar(class_name, grammar)
    sizes = [len(words) for words in fields.values()]
    # The class is part of the seed, so that two classes do not draw the same combinations of words.
    rng = np.random.default_rng(derive_seed(seed, *class_name.encode()))
    prompts = {}  # a dict keeps the order and drops repetitions: two combinations may give the same sentence
    for combination in rng.permutation(math.prod(sizes)):
        if len(prompts) == count:
            break
        choice = np.unravel_index(combination, sizes)
        words = {name: fields[name][i] for name, i in zip(fields, choice, strict=True)}
        prompts[template.format(**words)] = None
    prompts = list(prompts)
    return [prompts[i % len(prompts)] for i in range(count)]
