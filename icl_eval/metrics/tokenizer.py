"""Captions as words, the way COCO's evaluation sees them, without Java.

COCO's captions are split by the Penn Treebank tokenizer of Stanford CoreNLP 3.4.1 (`-preserveLines -lowerCase`), and
tokens that are punctuation are dropped (Chen et al. 2015, arXiv 1504.00325). Scores depend on it: "don't" is two
words, "U.S." keeps its full stops, brackets stay as `-lrb-` and `-rrb-`. This tokenizer was written from what that one
puts out; `tests/icl_eval/metrics/test_tokenizer.py` holds how often the two agree.
"""

from __future__ import annotations

import re

NAME = "flamingo-icl ptb 2"
"""Names the tokenizer and its version in results; the number rises whenever an output changes."""

DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"', *"‘’‛“”„«»"])
"""Tokens that COCO's evaluation drops. It means to drop brackets too, but looks for them in upper case."""

_ABBREVIATIONS = (
    "adm al ala alex apr ariz assn attys? aug ave bancorp bhd bldg blvd brig bros calif capt cf cie co?mdr col colo "
    "conn corp cos? cpl ct dak dec dept det drs? esq est etc feb fla fri ft ga gen govs? hon inc ind intl jan jos "
    "jr jul jun kans? ky lieut lt ltd maj mar md messrs mich minn mlle mme mo mon mont mrs? ms mt neb nev nov oct "
    "okla penn pfc ph plc pres profs? pte pty pvt rd reps? rev rt sens? sept? seq sgt spc sq sr ste? supts? sys tel "
    "tenn thu thurs treas tues? univ va vs vt wed wisc? wm wyo"
)
_CAPITALISED_ABBREVIATIONS = "ark az del ill la mass miss ore pa tex wash"
_NUMBERED_ABBREVIATIONS = "art ca figs? nos? op pp prop"
_APOSTROPHE_WORDS = "'n' 'em 'till? 'cause 'cuz ol'"
_SENTENCE_STARTERS = (
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now Once "
    "One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You"
)


def _any(words: str) -> str:
    return "(?:" + "|".join(words.replace("'", "['’]").split()) + ")"


_ACCENT = r"[\u0300-\u036f]"  # of letters that are written in two characters
_LETTER = rf"(?:[^\W\d_]|{_ACCENT})"
_WORD = rf"(?:[^\W_²³¹]|{_ACCENT})+"
_ASCII = "[A-Za-z0-9]+"
_CLITIC = rf"['’](?:[smd]|ll|re|ve)(?!{_LETTER})"
_NOT = rf"n['’]t(?!{_LETTER})"
_CAPITALISED = _any(" ".join(f"{word.title()} {word.upper()}" for word in _CAPITALISED_ABBREVIATIONS.split()))
_STARTER = f"(?-i:{_any(_SENTENCE_STARTERS)})"

# The first alternative that fits wins, so the longer ones come first.
_TOKEN = re.compile(
    rf"""
      (?: https?:// | www\. ) [^\s"<>|(){{}}]* [^\s"<>|(){{}}.,;:!?'-]       # an address on the web
    | [\w.%+-]+ @ \w[\w-]* (?: \.\w[\w-]* )+                                 # an address of mail
    | < /? (?-i:[A-Za-z!?]) [^\s<>]* (?: \s [^<>]* )? >                      # a tag
    | [:;=] -? [()DPO|] (?! \w )                                             # a smiley
    | [@\#] {_LETTER} \w*                                                    # a name or a topic on Twitter
    | (?: {_LETTER} \. )+ (?: {_LETTER} \.? )? (?: - {_ASCII} )+             # U.S.-based
    | (?: {_LETTER} \. )+ {_LETTER} \b (?! [-'’/] ) (?: \. (?! \w ) )?       # U.S., a.m
    | (?: {_any(_ABBREVIATIONS)} | (?-i:{_CAPITALISED}) ) \. (?! \w | \. )   # St.
    | {_any(_NUMBERED_ABBREVIATIONS)} \. (?= \s* \d )                        # No. of No. 5
    | [a-z] \. (?! \w | \. | \s\s | \s {_STARTER} (?! \S ) )                 # the initial of J. Doe
    | {_any(_APOSTROPHE_WORDS)} (?! {_LETTER} )
    | ['’] \d0s \b                                                           # '90s
    | ' t (?= is\b | was\b ) | y ['’] (?= {_LETTER} )                        # 't of 'tis, y' of y'all
    | can (?= not\b ) | go[nt] (?= [nt]a\b ) | wan (?= na\b ) | (?: le | gi ) m (?= me\b )
    | {_CLITIC} | {_NOT} | {_LETTER}+? (?= {_NOT} )                          # 's, n't, do of don't
    | (?! [iy] ) {_LETTER} ['’] {_LETTER} {_LETTER}+                         # O'Brien
    | {_LETTER}* [aeiou] ['’] [aeiou] {_LETTER}*                             # Hawai'i
    | (?-i: [A-Z]+ (?: [&+] [A-Z]+ )+ )                                      # AT&T
    | {_ASCII} (?: - {_ASCII} )* (?: / {_ASCII} (?: - {_ASCII} )* ){{1,2}}   # and/or
    | [A-Za-z0-9] [A-Za-z0-9.,]* (?<! [.,] ) (?: - {_WORD} )+                # red,black-and-white
    | {_WORD} (?: [-_] {_WORD} )+                                            # twin-hulled
    | -{{2,}} | [-+]? (?> \d+ (?: [.,:] \d+ )+ | (?: [.,:] \d+ )+ )          # 3:30, 1,000, .5
    | [-+] \d++ | \d++ (?! {_LETTER} )
    | {_LETTER} (?: {_WORD} )? (?: [.!?] {_LETTER} (?: {_WORD} )? )*         # dog.cat, which is one word
    | {_WORD} | \.\.\. | \.{{4,}} | [?!]+ | _+ | \*+ | \#+ | `` | '' | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)

_WRITTEN_OUT = str.maketrans(
    {"…": " ... ", "–": " -- ", "—": " -- ", "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 "}
    | {"€": "$", "£": "# ", "¢": " cents ", "\xad": None}
    | dict.fromkeys("\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\ufe0f‒―‹›", " ")  # it drops what it does not know
)
_STRAIGHTENED = re.compile(f"{_CLITIC}|{_NOT}", re.IGNORECASE)
_BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"})
_BEYOND_THE_BASIC_PLANE = re.compile("[\U00010000-\U0010ffff]")


def tokenize(text: str) -> str:
    """A caption → its words in lower case, joined by single spaces, without punctuation.

    >>> tokenize("The dog isn't on Main St., it's (almost) twin-hulled!")
    "the dog is n't on main st. it 's -lrb- almost -rrb- twin-hulled"
    """
    tokens = _TOKEN.findall(_BEYOND_THE_BASIC_PLANE.sub(" ", text).translate(_WRITTEN_OUT))
    return " ".join(_written(token) for token in tokens if token not in DROPPED)


def _written(token: str) -> str:
    if _STRAIGHTENED.fullmatch(token):
        token = token.replace("’", "'")
    return token.translate(_BRACKETS).lower()
