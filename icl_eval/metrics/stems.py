"""Stems of answers for OK-VQA: plurals without their s, -ing forms as plain verbs; other words stay.

OK-VQA's released answers are stemmed much this way. OpenFlamingo redoes it with NLTK's tagger and WordNet, which are
fetched from the network; the rules here need nothing. They follow the -ing rule of Porter 1980 ("An algorithm for
suffix stripping", step 1b), with tables for what it gets wrong, and for words that the released answers have cut
further, as OpenFlamingo's ok_vqa_utils.py lists them.
"""

from __future__ import annotations

import re

_AS_THEY_ARE = frozenset(
    "yes vegas las christmas tennis glass grass dress bus gas series "
    "species news is was has does his its this us as mars texas paris james chess cross lens across always "
    "less nothing something anything everything during ceiling duckling sibling darling herring sterling "
    "viking inning earring shilling physics athletics gymnastics mathematics politics swiss canvas atlas iris "
    "cactus octopus virus walrus campus circus focus lotus asparagus hippopotamus citrus papyrus".split()
)
_IRREGULAR = {
    "men": "man",
    "women": "woman",
    "children": "child",
    "people": "person",
    "feet": "foot",
    "teeth": "tooth",
    "geese": "goose",
    "mice": "mouse",
    "leaves": "leaf",
    "knives": "knife",
    "wives": "wife",
    "loaves": "loaf",
    "wolves": "wolf",
    "calves": "calf",
    "halves": "half",
    "buses": "bus",
    "gases": "gas",
    "lenses": "lens",
    "circuses": "circus",
    "skis": "ski",
    "taxis": "taxi",
    "kiwis": "kiwi",
    "bikinis": "bikini",
    "ties": "tie",
    "pies": "pie",
    "movies": "movie",
    "cookies": "cookie",
    "shoes": "shoe",
    "toes": "toe",
    "canoes": "canoe",
    "lying": "lie",
    "dying": "die",
    "tying": "tie",
    "morning": "morn",
    "clothes": "cloth",
    "clothing": "cloth",
    "ageing": "age",
    "aging": "age",
    "adding": "add",
    "being": "be",
    "seeing": "see",
    "fleeing": "flee",
    "skiing": "ski",
    "tasting": "taste",
    "changing": "change",
    "arranging": "arrange",
    "exchanging": "exchange",
    "competing": "compete",
    "creating": "create",
    "exploring": "explore",
    "preparing": "prepare",
    "sharing": "share",
    "staring": "stare",
    "wasting": "waste",
    "bathing": "bathe",
    "sunbathing": "sunbath",
    "breathing": "breathe",
}
_CUT = dict(
    pair.split(":")
    for pair in (
        "pudding:pud buildings:build paintings:paint weddings:wed meetings:meet stockings:stock toppings:top "
        "markings:mark settings:set belongings:belong earnings:earn casings:case browsing:brows teasing:teas "
        "socializing:social urinating:urine vacationing:vacate dangerous:danger mountainous:mountain "
        "coniferous:conifer sickness:sick illness:ill blindness:blind sadness:sad brightness:bright wetness:wet "
        "ripeness:ripe baldness:bald alertness:alert playfulness:play wilderness:wilder firefighters:firefight "
        "skateboarders:skateboard backpackers:backpack travelers:travel travellers:travel designers:design "
        "reporters:report protesters:protest containers:contain controllers:control propellers:propel "
        "suspenders:suspend reminders:remind hamburgers:hamburg elevators:elev directions:direct "
        "reflections:reflect expressions:express decorations:decor projections:project transitions:transit "
        "professionals:profession nationals:nation personals:person minerals:miner apartments:apart "
        "conferences:confer electronics:electron mopeds:mope routes:rout"
    ).split()
)
_VOWEL = re.compile("[aeiouy]")
_SHORT = re.compile("[^aeiou]+[aeiouy][^aeiouwxy]")  # hik-, rid-: one syllable that an e has left


def stem(answer: str) -> str:
    """Every word of an answer stemmed, joined by single spaces.

    >>> stem("riding horses")
    'ride horse'
    """
    return " ".join(map(_stem_word, answer.lower().split()))


def _stem_word(word: str) -> str:
    word = word.removesuffix("'s")
    if word in _AS_THEY_ARE:
        return word
    if other := _IRREGULAR.get(word) or _CUT.get(word):
        return other
    if word.endswith("ing") and _VOWEL.search(word[:-3]):
        return _plain_verb(word[:-3])
    if word.endswith("s") and len(word) > 3:
        return _singular(word)
    return word


def _plain_verb(root: str) -> str:
    """The verb of which `root` is left without its -ing."""
    if len(root) > 2 and root[-1] == root[-2] and root[-1] not in "aeoslz":
        return root[:-1]  # running
    ends_in_e = root.endswith(("v", "u", "c", "bl", "tl", "gl", "dl", "kl", "pl", "fl", "iz", "dg", "rg"))
    single_s = root.endswith("s") and not root.endswith("ss")
    latin = root.endswith("at") and root[-3:-2] not in tuple("aeou") and len(root) > 3  # decorating, not eating
    return root + "e" if ends_in_e or single_s or latin or _SHORT.fullmatch(root) else root


def _singular(word: str) -> str:
    if word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes", "zzes", "oes")):
        return word[:-2]
    return word[:-1]
