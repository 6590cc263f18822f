"""The words of the embedded world: vocabulary, tokenizer, invented names, and the text that the language model reads.

An invented name is two syllables of a consonant and a vowel ("kobu"): always two tokens, never a word of the
vocabulary. A tenth of the names is kept out of every training text, so that an evaluation can ask for unseen ones.

The text world teaches a language model what a Flamingo will need of it, without a single picture: to look back in its
context for what followed the last time (repeated segments, documents in which attribute words stand where pictures
will stand), the phrases of captions, questions and instructions, and a few facts. Templates follow Otter's and
OpenFlamingo's.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data_shards.glyphs.pictures import POSITIONS, STYLES, WORLD_SEED, load_world
from flamingo.instructions import ANSWER
from flamingo.processing import END_OF_CHUNK

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNKNOWN, END_OF_CHUNK, ANSWER)

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
SYLLABLES = tuple(consonant + vowel for consonant in CONSONANTS for vowel in VOWELS)

COLOURS = tuple("red orange yellow green blue purple pink brown black white grey golden".split())
SHAPES = tuple("round square long short wide narrow flat curved straight pointed crooked hooked".split())
TEXTURES = tuple("smooth rough soft hard shiny dull wet dry warm cold heavy light".split())
TEMPERS = tuple("quiet loud calm wild happy sad gentle proud shy brave clever lazy".split())
MATERIALS = tuple("wood stone glass paper iron clay silk wool".split())
ADJECTIVES = COLOURS + SHAPES + TEXTURES + TEMPERS
THINGS = tuple(
    "apple bird boat book bridge cat chair cloud coat cup dog door drum feather fish flower garden hat hill horse "
    "house kettle key knife lamp leaf letter moon mountain needle pot ring river road rose shell ship shoe spoon star "
    "sun table tower tree wheel window".split()
)
NUMBERS = tuple("zero one two three four five six seven eight nine".split())
ORDINALS = tuple("first second third fourth fifth last next".split())
GRAMMAR = tuple(
    "a about after all also an and animated answer any appear appears are as at be before beside big between both but "
    "by called can centre character clearly come comes corner count describe did different do does drawn drawing each "
    "else end every exactly examples figure find finally follow following from get gets give given glyph go goes got "
    "has have he here how i if image images in into is it its just kind know known large left less like list look "
    "looks made make many may mean me middle more most move moves moving my name named names new no none normal not "
    "nothing now number of off on once only or order other our out over page pair part phrase picture pictures place "
    "placed plain please point position question right same say see seen sequence set she short should show shown "
    "shows side sign single small so some something stand stands state still story style such symbol tell than that "
    "the their them then there these they thing this time to together top up upon us use very want was way we well "
    "were what when where whether which while who whole why will with without word words write written yes yet you "
    "your contain contains differ question colour change changes stays stay happens happen sentence sketch "
    "glyphs signs symbols drawings letters characters words pairs caption text sides "
    "label exist exists present both twice again another object inside outside edge form forms kind how".split()
)
CAPITALS = tuple("User GPT Output Question Answer Short A It The This That These What Which Where How Is Are".split())
WORDS = tuple(
    dict.fromkeys(ADJECTIVES + MATERIALS + THINGS + NUMBERS + ORDINALS + GRAMMAR + CAPITALS + STYLES + POSITIONS)
)
CHARACTERS = (*map(chr, range(32, 127)), "\n", "\t")


def vocabulary() -> list[str]:
    """Every token, the id being the place in the list."""
    continuing = [f"##{syllable}" for syllable in SYLLABLES]
    letters = [f"##{character}" for character in CHARACTERS if character.isalnum()]
    return list(dict.fromkeys([*SPECIAL_TOKENS, *CHARACTERS, *letters, *SYLLABLES, *continuing, *WORDS]))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer: whole words, else syllables, else single characters; every ASCII text without an unknown token.

    A single space between two letters or digits is implied, any other white space is a token of its own, so that
    `User:what` and `User: what` differ and decoding gives both back as they were. Needs `tokenizers`, `transformers`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {token: i for i, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=UNKNOWN, max_input_chars_per_word=10_000))
    # Accents go; anything else outside ASCII becomes the unknown token, one for each character.
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("(?<=[A-Za-z0-9]) (?=[A-Za-z0-9])"), "removed"),
            pre_tokenizers.Split(Regex("[A-Za-z0-9]+|[^A-Za-z0-9]"), "isolated"),
        ]
    )
    # Mark where a word opens, join, then put a space wherever a word opens right after a letter or digit.
    opening, word_character = "\u2581", "[A-Za-z0-9]"
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex(f"^(?={word_character})"), opening),
            decoders.Replace(Regex("^##(?=.)"), ""),
            decoders.Fuse(),
            decoders.Replace(Regex(f"(?<={word_character}){opening}"), " "),
            decoders.Replace(opening, ""),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[END_OF_CHUNK, ANSWER],
        clean_up_tokenization_spaces=False,
        padding_side="right",
        model_max_length=4096,
    )


# ----------------------------------------------------------------------------------------------------------- names


def _is_two_tokens(first: str, second: str) -> bool:
    """Whether greedy longest-match splits the name just between its syllables."""
    words, name = set(WORDS), first + second
    return not any(name[:end] in words for end in range(2, len(name) + 1))


@functools.lru_cache(maxsize=1)
def _names() -> tuple[dict[int, str], dict[str, tuple[str, ...]]]:
    names = [a + b for a in SYLLABLES for b in SYLLABLES if a != b and _is_two_tokens(a, b)]
    random.Random(WORLD_SEED).shuffle(names)
    known = load_world().known
    fixed = dict(zip(known, names, strict=False))
    rest = names[len(known) :]
    kept = len(rest) // 10
    return fixed, {"unseen": tuple(rest[:kept]), "train": tuple(rest[kept:])}


def fixed_names() -> dict[int, str]:
    """The name that each known class keeps for good; these names are never drawn for anything else."""
    return dict(_names()[0])


def names_of(split: str = "train") -> tuple[str, ...]:
    """All invented names of "train" (for any training text) or "unseen" (kept for evaluations)."""
    return _names()[1][split]


def fresh_names(rng: random.Random | np.random.Generator, count: int, split: str = "train") -> list[str]:
    """Draw `count` different names. `rng` is a `random.Random` or a numpy Generator; `split` as of `names_of`."""
    names = names_of(split)
    if isinstance(rng, random.Random):
        return rng.sample(names, count)
    return [names[int(i)] for i in rng.choice(len(names), count, replace=False)]


# ------------------------------------------------------------------------------------------------------- templates

# After a picture, when a name is taught or asked for; the first is the evaluation's own prompt.
NAMING_TEMPLATES = (
    "{name}",
    "a {name}",
    "this is a {name}",
    "this is a {name}.",
    "it is called {name}.",
    "here is the {name}.",
    "Output:{name}",
    "Output:a {name}",
    "Question:what is this? Short answer:{name}",
    "the name of this is {name}.",
)

# Wordings of each question. The last two of every kind stay out of all training: an evaluation's unseen wordings.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "name": (
        "what is this?",
        "what is the name of this?",
        "what is it called?",
        "name the symbol.",
        "what do you see?",
        "what is shown here?",
        "which symbol is this?",
        "tell me its name.",
        "how is this sign called?",
        "give the name of the glyph in the picture.",
    ),
    "style": (
        "what style is it?",
        "in which style is it drawn?",
        "how is it drawn?",
        "what is the style of this?",
        "name the style.",
        "what does the drawing look like?",
        "tell me the style of the glyph.",
        "which style has the symbol?",
    ),
    "position": (
        "where is it?",
        "where is the symbol?",
        "at which side does it stand?",
        "what is its position?",
        "in which part of the image is it?",
        "tell me where it is placed.",
        "which place has the glyph?",
        "on which side is the sign?",
    ),
    "same": (
        "are they the same?",
        "are these the same or different?",
        "same or different?",
        "do both pictures show the same symbol?",
        "is it the same symbol?",
        "tell whether they differ.",
        "do the two glyphs differ or not?",
        "are both signs of one kind?",
    ),
    "count": (
        "how many pictures are there?",
        "how many are shown?",
        "count the pictures.",
        "how many images do you see?",
        "what number of glyphs is shown?",
        "how many signs are in the list?",
    ),
    "exists": (
        "is this a {name}?",
        "is it a {name}?",
        "do you see a {name}?",
        "does the image show a {name}?",
        "is there a {name} here?",
        "can you find a {name}?",
    ),
    "story": (
        "tell the story.",
        "tell a story about the pictures.",
        "what happens in the pictures?",
        "write a short story.",
        "describe the images in order.",
        "what comes first and what comes then?",
        "say what the pictures tell.",
    ),
    "sequence": (
        "how does it move?",
        "where does it go?",
        "what happens in the sequence?",
        "describe how it moves.",
        "which way does the glyph go?",
        "from where to where does it move?",
    ),
}
UNSEEN_WORDINGS = 2

# Answers: the concise ones first, then full sentences. {a} is the answer word.
ANSWERS: dict[str, tuple[str, ...]] = {
    "name": ("{a}", "a {a}", "this is a {a}.", "it is called {a}."),
    "style": ("{a}", "it is {a}.", "the style is {a}."),
    "position": ("{a}", "at the {a}", "it is at the {a}."),
    "same": ("{a}", "they are {a}."),
    "count": ("{a}", "there are {a}."),
    "exists": ("{a}", "{a}, it is.", "{a}, it is not."),
    "sequence": ("{a}", "it goes {a}.", "it moves {a}."),
}
TURN = "User:{q} GPT:<answer>{a}<|endofchunk|>"
SPACED_TURN = "User: {q} GPT:<answer> {a}<|endofchunk|>"


def training_questions(kind: str) -> tuple[str, ...]:
    """The wordings of a question that training may use; the others are for evaluation."""
    return QUESTIONS[kind][:-UNSEEN_WORDINGS]


def held_out_questions(kind: str) -> tuple[str, ...]:
    """The wordings of a question that no training may use."""
    return QUESTIONS[kind][-UNSEEN_WORDINGS:]


def story(names: Sequence[str]) -> str:
    """A short story of the things seen, in order."""
    seen = [f"{'an' if name[0] in VOWELS else 'a'} {name}" for name in names]
    if len(seen) == 1:
        return f"there is {seen[0]}."
    middle = "".join(f" then {each} comes." for each in seen[1:-1])
    return f"first there is {seen[0]}.{middle} the last is {seen[-1]}."


# ------------------------------------------------------------------------------------------------------ text world


class TextWorld:
    """Endless text for the language model, as lists of token ids; a pure function of the seed."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        facts = random.Random(WORLD_SEED)  # the facts hold in every text, whatever the seed
        values = {"colour": COLOURS, "material": MATERIALS, "form": SHAPES}
        self.facts = {about: {thing: facts.choice(words) for thing in THINGS} for about, words in values.items()}
        special = set(tokenizer.all_special_ids)
        self._plain = [i for i in range(len(tokenizer)) if i not in special]
        facts.shuffle(self._plain)

    # Documents as text

    def looks(self) -> list[str]:
        """Words that stand for what a picture would show: one to three attributes, sometimes a thing."""
        words = self.rng.sample(ADJECTIVES, self.rng.choice((1, 1, 2, 2, 3)))
        return [*words, self.rng.choice(THINGS)] if self.rng.random() < 0.4 else words

    def _seen_again(self, looks: Sequence[str]) -> str:
        """The same looks as they vary from picture to picture: sometimes a word more, sometimes in another order."""
        words = list(looks)
        if self.rng.random() < 0.3:
            words.insert(self.rng.randrange(len(words) + 1), self.rng.choice(ADJECTIVES))
        if self.rng.random() < 0.15:
            self.rng.shuffle(words)
        return " ".join(words)

    def few_shot(self, chunks: int) -> str:
        """Looks, a template, a name, end of chunk; the same looks keep their name within the document."""
        rng = self.rng
        ways = rng.randint(1, min(6, max(1, chunks // 2)))
        classes = [(self.looks(), name) for name in fresh_names(rng, ways)]
        template = "{name}" if rng.random() < 0.3 else rng.choice(NAMING_TEMPLATES)
        text = []
        for _ in range(chunks):
            looks, name = rng.choice(classes)
            glue = "" if template[0].isupper() and rng.random() < 0.5 else " "
            text.append(f"{self._seen_again(looks)}{glue}{template.format(name=name)}{END_OF_CHUNK}")
        return "".join(text)

    def fact(self) -> str:
        """A sentence or a question about the things of this world."""
        rng = self.rng
        thing = rng.choice(THINGS)
        subject, value = rng.choice(list(self.facts.items()))
        answer = value[thing]
        if subject == "material":
            statement, question = f"the {thing} is made of {answer}.", f"what is the {thing} made of?"
        elif subject == "colour":
            statement, question = f"the {thing} is {answer}.", f"what colour has the {thing}?"
        else:
            statement, question = f"the form of the {thing} is {answer}.", f"what form has the {thing}?"
        kind = rng.random()
        if kind < 0.5:
            return statement + " "
        if kind < 0.6:
            return f"Question:{question} Short answer:{answer}{END_OF_CHUNK}"
        if kind < 0.8:
            return self._turn(question, rng.choice((answer, statement)), rng.random() < 0.5)
        yes = rng.random() < 0.5
        other = answer if yes else rng.choice([v for v in value.values() if v != answer])
        ask = f"is it made of {other}?" if subject == "material" else f"is it {other}?"
        return self._turn(f"{statement} {ask}", "yes" if yes else "no", rng.random() < 0.5)

    @staticmethod
    def _turn(question: str, answer: str, spaced: bool) -> str:
        return (SPACED_TURN if spaced else TURN).format(q=question, a=answer)

    def instructions(self, turns: int) -> str:
        """A document of instruction turns of one or of several kinds, answered in one style throughout."""
        rng = self.rng
        classes = [(self.looks(), name) for name in fresh_names(rng, rng.randint(2, 4))]
        spaced, form = rng.random() < 0.5, rng.choice((0, 0, 0, 1, 2, 3))
        kinds = rng.sample(list(QUESTIONS), rng.choice((1, 1, 2, 3)))
        return "".join(self._instruction(rng.choice(kinds), classes, spaced, form) for _ in range(turns))

    def _instruction(self, kind: str, classes: Sequence[tuple[list[str], str]], spaced: bool, form: int) -> str:
        """Words in the place of one or more pictures, a question about them, and its answer in the given form."""
        rng = self.rng
        looks, name = rng.choice(classes)
        picture = self._seen_again(looks)
        question = rng.choice(training_questions(kind))
        forms = ANSWERS.get(kind, ("{a}",))
        answer = forms[form % len(forms)]
        if kind == "name":
            value = name
        elif kind == "style":
            value = rng.choice(("plain", *STYLES))
            picture = f"{value} {picture}"
        elif kind == "position":
            value = rng.choice(POSITIONS)
            picture = f"{picture} {value}"
        elif kind == "same":
            other, called = rng.choice(classes) if rng.random() < 0.5 else (looks, name)
            value = "same" if called == name else "different"
            picture = f"{picture}, {self._seen_again(other)}"
        elif kind == "exists":
            asked = rng.choice(classes)[1] if rng.random() < 0.5 else name
            value = "yes" if asked == name else "no"
            answer = forms[0] if form % 2 == 0 else forms[1] if value == "yes" else forms[2]
            picture, question = f"{picture} {name}.", question.format(name=asked)
        elif kind == "count":
            count = rng.randint(1, 5)
            value = NUMBERS[count]
            picture = ", ".join(" ".join(rng.choice(classes)[0]) for _ in range(count))
        elif kind == "story":
            told = [rng.choice(classes) for _ in range(rng.randint(2, 4))]
            value = story([called for _, called in told])
            picture = ", ".join(f"{' '.join(seen)} {called}" for seen, called in told)
        else:
            start, end = rng.sample(POSITIONS, 2)
            value = f"from {start} to {end}"
            picture = f"{picture} {start}, {picture} {end}"
        return f"{picture} " + self._turn(question, answer.format(a=value), spaced)

    # Sequences of token ids

    def repeats(self, length: int, vocabulary: int | None = None) -> tuple[list[int], int]:
        """A random segment again and again, and the segment's length: what teaches a model to look back and copy.

        vocabulary: make it of the first so many tokens of a fixed random order; default: of all.
        """
        rng = self.rng
        longest = 16 if length <= 64 else 48
        segment = rng.choices(self._plain[:vocabulary], k=rng.randint(3, longest))
        return (segment * (length // len(segment) + 1))[:length], len(segment)

    def document(self, kind: str, length: int) -> str:
        """A document of a kind: "few_shot" (for about `length` tokens), "instructions" or "facts"."""
        if kind == "few_shot":
            return self.few_shot(self.rng.randint(max(3, length // 12), max(6, length // 6)))
        if kind == "instructions":
            return self.instructions(self.rng.randint(3, 8))
        return "".join(self.fact() for _ in range(4))

    def sequence(
        self, shares: dict[str, float], length: int, vocabulary: int | None = None
    ) -> tuple[list[int], list[int]]:
        """`length` ids, and their labels: <s> and a document of one kind, filled up by further ones.

        shares: probability of "repeats", "few_shot", "facts" and "instructions". The first occurrence of a repeated
        segment has label −100: it is noise, and nothing can be learnt from it.
        """
        kind = self.rng.choices(list(shares), weights=list(shares.values()))[0]
        ids = [self.tokenizer.bos_token_id]
        if kind == "repeats":
            repeated, first = self.repeats(length - 1, vocabulary)
            return ids + repeated, [-100] * (first + 1) + repeated[first:]
        while len(ids) < length:
            ids += self.tokenizer(self.document(kind, length), add_special_tokens=False).input_ids
            ids += [self.tokenizer.eos_token_id, self.tokenizer.bos_token_id]
        return ids[:length], ids[:length]

    def batch(
        self, shares: dict[str, float], count: int, length: int, vocabulary: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Ids and labels (count, length) of `sequence`s, as int64 tensors."""
        import torch

        rows = [self.sequence(shares, length, vocabulary) for _ in range(count)]
        return torch.tensor([ids for ids, _ in rows]), torch.tensor([labels for _, labels in rows])
