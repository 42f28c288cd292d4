"""The questions on which the bundled demo model is trained and tested.

Owns: kinds of questions, phrasings, facts, and the split into training and held-out questions.
Does not know: tokens, tensors, how an answer is computed.
Invariant: a question's split depends only on its content (a hash of the pair of numbers, the word,
or the fact with its phrasing), never on a seed, so no held-out question is ever trained on.
Next: `tools/train_demo.py` trains on `tasks("train", seed)`.

>>> held_out("reverse", 1)[0].kind
'reverse'
>>> is_correct(Task("add", "What is 2 + 3?", "5"), " 5\\n")
True
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "held_out"]

KINDS = ("add", "reverse", "sort", "upper", "length", "count", "fact")

HELD_OUT_ONE_IN = 10
LARGEST_ADDEND = 999
SHORTEST_WORD, LONGEST_WORD = 3, 8


@dataclass(frozen=True)
class Task:
    """A question in plain English and its only correct answer."""

    kind: str
    question: str
    answer: str


# Phrasings of each kind. {w} is a word, {a} and {b} are numbers.
PHRASINGS: dict[str, tuple[str, ...]] = {
    "add": (
        "What is {a} + {b}?",
        "{a} + {b} = ?",
        "{a}+{b}",
        "Add {a} and {b}.",
        "How much is {a} plus {b}?",
    ),
    "reverse": (
        'Spell "{w}" backwards.',
        "Spell {w} backwards.",
        "Spell the word {w} backwards.",
        'Reverse the word "{w}".',
        "What is {w} spelled backwards?",
    ),
    "sort": (
        'Sort the letters of "{w}".',
        "Sort the letters of {w} alphabetically.",
        'Put the letters of "{w}" in alphabetical order.',
        "Put the letters of {w} in alphabetical order.",
    ),
    "upper": (
        'Write "{w}" in capital letters.',
        "Write {w} in capital letters.",
        "Make {w} uppercase.",
        'Make "{w}" uppercase.',
    ),
    "length": (
        'How many letters are in "{w}"?',
        "How many letters are in {w}?",
        "How many letters does {w} have?",
        'How long is the word "{w}"?',
    ),
    "count": (
        "Count from {a} to {b}.",
        "Please count from {a} to {b}.",
        "List the numbers from {a} to {b}.",
    ),
}

# Groups of facts: phrasings, then subject -> answer. Every phrasing fits every subject.
FACTS: tuple[tuple[tuple[str, ...], dict[str, str]], ...] = (
    (
        (
            "What is the capital of {x}?",
            "Name the capital of {x}.",
            "Which city is the capital of {x}?",
            "Tell me the capital city of {x}.",
            "{x}: what is its capital?",
        ),
        {
            "France": "Paris",
            "Germany": "Berlin",
            "Italy": "Rome",
            "Spain": "Madrid",
            "Portugal": "Lisbon",
            "Greece": "Athens",
            "Austria": "Vienna",
            "Poland": "Warsaw",
            "Sweden": "Stockholm",
            "Norway": "Oslo",
            "Denmark": "Copenhagen",
            "Finland": "Helsinki",
            "Ireland": "Dublin",
            "England": "London",
            "Hungary": "Budapest",
            "Russia": "Moscow",
            "Egypt": "Cairo",
            "Kenya": "Nairobi",
            "Japan": "Tokyo",
            "China": "Beijing",
            "India": "New Delhi",
            "Canada": "Ottawa",
            "Cuba": "Havana",
            "Peru": "Lima",
        },
    ),
    (
        (
            "What sound does a {x} make?",
            "Which sound does a {x} make?",
            "What does a {x} say?",
            "Tell me the sound of a {x}.",
        ),
        {
            "cow": "moo",
            "dog": "woof",
            "cat": "meow",
            "duck": "quack",
            "sheep": "baa",
            "pig": "oink",
            "lion": "roar",
            "bee": "buzz",
        },
    ),
    (
        (
            "What colour is {x}?",
            "What is the colour of {x}?",
            "Tell me the colour of {x}.",
            "Which colour does {x} have?",
        ),
        {
            "grass": "green",
            "snow": "white",
            "coal": "black",
            "blood": "red",
            "the sky": "blue",
            "the sun": "yellow",
            "a lemon": "yellow",
            "a carrot": "orange",
            "chocolate": "brown",
        },
    ),
    (
        (
            "Which day comes after {x}?",
            "What day comes after {x}?",
            "What is the day after {x}?",
            "Name the day after {x}.",
        ),
        {
            "Monday": "Tuesday",
            "Tuesday": "Wednesday",
            "Wednesday": "Thursday",
            "Thursday": "Friday",
            "Friday": "Saturday",
            "Saturday": "Sunday",
            "Sunday": "Monday",
        },
    ),
    (
        (
            "Which day comes before {x}?",
            "What day comes before {x}?",
            "What is the day before {x}?",
            "Name the day before {x}.",
        ),
        {
            "Monday": "Sunday",
            "Tuesday": "Monday",
            "Wednesday": "Tuesday",
            "Thursday": "Wednesday",
            "Friday": "Thursday",
            "Saturday": "Friday",
            "Sunday": "Saturday",
        },
    ),
    (
        (
            "Which month comes after {x}?",
            "What month comes after {x}?",
            "What is the month after {x}?",
            "Name the month after {x}.",
        ),
        {
            "January": "February",
            "February": "March",
            "March": "April",
            "April": "May",
            "May": "June",
            "June": "July",
            "July": "August",
            "August": "September",
            "September": "October",
            "October": "November",
            "November": "December",
            "December": "January",
        },
    ),
    (
        (
            "What is the opposite of {x}?",
            "Name the opposite of {x}.",
            "Tell me the opposite of {x}.",
            "Which word means the opposite of {x}?",
        ),
        {
            "hot": "cold",
            "big": "small",
            "up": "down",
            "day": "night",
            "good": "bad",
            "fast": "slow",
            "open": "closed",
            "black": "white",
            "old": "new",
            "rich": "poor",
        },
    ),
    (
        (
            "What is a young {x} called?",
            "What do you call a young {x}?",
            "What is the name of a young {x}?",
            "Name a young {x}.",
        ),
        {
            "dog": "puppy",
            "cat": "kitten",
            "cow": "calf",
            "sheep": "lamb",
            "horse": "foal",
            "pig": "piglet",
        },
    ),
    (
        ("{x}", "{x} Please answer.", "Question: {x}", "Please tell me: {x}"),
        {
            "Who are you?": "I am a small demo model. I run on your own machines.",
            "What can you do?": "I can add numbers, spell words backwards, sort letters and count.",
            "How many experts do you have?": "16 in every layer, and 4 of them answer each token.",
            "Can you say the alphabet?": "a b c d e f g h i j k l m n o p q r s t u v w x y z",
        },
    ),
)

_COMMON = """
air apple arm autumn baby bag ball banana basket beach bean bear bed bell bird blue boat book bottle
bowl box branch bread bridge bright bring brother brown bucket butter button cake camel camera
candle car castle cat chair cheese cherry child circle clock cloud coat coffee cold copper corn
cotton country cream crown cup dance desert desk doctor dog door dragon dream dress drink drum duck
eagle ear early earth egg elephant engine evening expert eye face family farmer father feather field
finger fire fish flag flower flute forest fork fox friend frog fruit garden gate ghost giant girl
glass gold grape grass green guitar hair hammer hand harbor hat heart heavy hello hill honey horse
hotel house ice island jacket jam jar jungle kettle key king kitchen kite knife lake lamp laptop
leaf leather lemon letter library light lion little lizard machine magic mango map marble market
meadow melon metal milk mirror model money monkey moon morning mother mountain mouse mouth music
nail needle nest network night nose number nurse ocean office olive onion orange oven owl paint
palace panda paper parrot party peach pear pencil penguin pepper piano picture pillow pilot pirate
pizza planet plant plate pocket poem pond potato prince puzzle queen quick quiet rabbit radio rain
rainbow ribbon ring river road robot rocket room rope rose salt sand sandal school season server
shadow shark sheep shell ship shirt shoe silver sister sleep smile snake snow soap sock sofa soup
space spider spoon spring square squirrel star stone storm story street student sugar summer sun
sweet table tail tea teacher tent thunder tiger time toast today token tomato tooth tower town train
travel tree truck trumpet tulip turtle umbrella valley village violin voice walnut water whale wheat
wheel window winter wolf wonder wood world writer yellow zebra
"""
COMMON_WORDS = tuple(_COMMON.split())

_CONSONANTS = "bcdfghjklmnpqrstvwxyz"
_VOWELS = "aeiou"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def split_of(content: str) -> Split:
    """The split that this content belongs to: one in ten is held out, by its SHA-256."""
    digest = hashlib.sha256(content.encode()).digest()
    return "held_out" if int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0 else "train"


def _word(rng: random.Random, split: Split) -> str:
    """A word of this split: common English, pronounceable nonsense, or random letters."""
    while True:
        length = rng.randint(SHORTEST_WORD, LONGEST_WORD)
        style = rng.random()
        if style < 0.4:
            word = rng.choice(COMMON_WORDS)
        elif style < 0.7:
            odd = rng.randrange(2)
            word = "".join(
                rng.choice(_VOWELS if (i + odd) % 2 else _CONSONANTS) for i in range(length)
            )
        else:
            word = "".join(rng.choice(_LETTERS) for _ in range(length))
        if split_of(f"word {word}") == split:
            return word


def _word_task_maker(
    kind: str, answer: Callable[[str], str]
) -> Callable[[random.Random, Split], Task]:
    def make(rng: random.Random, split: Split) -> Task:
        word = _word(rng, split)
        return Task(kind, rng.choice(PHRASINGS[kind]).format(w=word), answer(word))

    return make


def _number(rng: random.Random) -> int:
    """0..LARGEST_ADDEND, with one, two and three digits all common."""
    return rng.randint(0, rng.choice((9, 99, 99, LARGEST_ADDEND)))


def _add(rng: random.Random, split: Split) -> Task:
    while True:
        a, b = _number(rng), _number(rng)
        # The pair is unordered: holding out 2 + 3 holds out 3 + 2.
        if split_of(f"add {min(a, b)} {max(a, b)}") == split:
            return Task("add", rng.choice(PHRASINGS["add"]).format(a=a, b=b), str(a + b))


def _count(rng: random.Random, split: Split) -> Task:
    while True:
        a = rng.randint(0, rng.choice((9, 90)))
        b = a + rng.randint(2, 9)
        if split_of(f"count {a} {b}") == split:
            answer = ", ".join(str(n) for n in range(a, b + 1))
            return Task("count", rng.choice(PHRASINGS["count"]).format(a=a, b=b), answer)


def _all_facts(split: Split) -> list[Task]:
    facts = (
        Task("fact", phrasing.format(x=subject), answer)
        for phrasings, answers in FACTS
        for subject, answer in answers.items()
        for phrasing in phrasings
    )
    return [task for task in facts if split_of(task.question) == split]


_FACT_TASKS: dict[Split, list[Task]] = {
    "train": _all_facts("train"),
    "held_out": _all_facts("held_out"),
}

_MAKERS: dict[str, Callable[[random.Random, Split], Task]] = {
    "add": _add,
    "reverse": _word_task_maker("reverse", lambda w: w[::-1]),
    "sort": _word_task_maker("sort", lambda w: "".join(sorted(w))),
    "upper": _word_task_maker("upper", str.upper),
    "length": _word_task_maker("length", lambda w: str(len(w))),
    "count": _count,
    "fact": lambda rng, split: rng.choice(_FACT_TASKS[split]),
}

# Relative frequency of each kind in training; harder kinds are more frequent.
_WEIGHTS = {"add": 6, "reverse": 4, "sort": 4, "upper": 1, "length": 2, "count": 1.5, "fact": 4}


def _vary_style(rng: random.Random, task: Task) -> Task:
    """The task; for one in six, without capital letters or without the final mark."""
    style = rng.randrange(12)
    if style == 0:
        return Task(task.kind, task.question.lower(), task.answer)
    if style == 1:
        return Task(task.kind, task.question.rstrip("?."), task.answer)
    return task


def tasks(split: Split, seed: int) -> Iterator[Task]:
    """An endless mix of this split's questions; the same seed gives the same questions."""
    rng = random.Random(seed)
    weights = [_WEIGHTS[kind] for kind in KINDS]
    while True:
        kind = rng.choices(KINDS, weights)[0]
        yield _vary_style(rng, _MAKERS[kind](rng, split))


def held_out(kind: str, count: int, seed: int = 0) -> list[Task]:
    """Different held-out questions of one kind: `count`, or fewer if it has no more (facts).

    Raises:
        KeyError: the kind is not in `KINDS`.
    """
    rng = random.Random(f"{seed} {kind}")
    if kind == "fact":
        pool = list(_FACT_TASKS["held_out"])
        rng.shuffle(pool)
        return pool[:count]
    unique: dict[str, Task] = {}
    for _ in range(100 * count):
        task = _MAKERS[kind](rng, "held_out")
        unique.setdefault(task.question, task)
        if len(unique) == count:
            break
    return list(unique.values())


def is_correct(task: Task, text: str) -> bool:
    """Whether a text is the answer, apart from white space around it."""
    return text.strip() == task.answer
