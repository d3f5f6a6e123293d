"""The corpus of tiny-qwen2: sums, chats and stories, drawn from a seeded random generator.

Every document belongs for good either to training or to the held-out side, by the hash of what it is about
(`held_out`), so the two sides cannot mix whatever the seed and however many documents are drawn.

Free choices are weighted steeply (`pick`) or follow from what the text already said: a reader who has learnt the
grammar is sure of nearly every next word, and a quantised model that disagrees with the original is really wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

END_OF_TEXT, TURN_START, TURN_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
DEFAULT_SYSTEM = "You are a helpful assistant."
HELD_OUT_SHARE = 10  # one key in ten
T = TypeVar("T")
Turn = tuple[str, str]  # what is asked, what is answered
Document = list[tuple[str, bool]]  # pieces of text, and whether the model learns to write them or only reads them


def held_out(key: str) -> bool:
    """Whether what `key` names is kept from training: fixed by its SHA-256, for one key in ten."""
    return hashlib.sha256(key.encode()).digest()[0] * HELD_OUT_SHARE < 256


def sum_is_held_out(a: int, b: int) -> bool:
    """Whether a+b is kept from training; b+a then is too, in every wording."""
    return held_out(f"{min(a, b)}+{max(a, b)}")


def pick(rng: Random, choices: Sequence[T], first: float = 0.6) -> T:
    """One of `choices`, the earlier the likelier: the first with probability `first`, then `first` of the rest, ..."""
    for choice in choices[:-1]:
        if rng.random() < first:
            return choice
    return choices[-1]


def operands(rng: Random) -> tuple[int, int]:
    """Two numbers of one or two digits whose sum is not held out."""
    while True:
        limit = rng.choices((10, 100), (1, 10))[0]
        a, b = rng.randrange(limit), rng.randrange(limit)
        if not sum_is_held_out(a, b):
            return a, b


def sum_document(rng: Random) -> Document:
    a, b = operands(rng)
    return [(f"{a}+{b}=", False), (f"{a + b}{END_OF_TEXT}", True)]


@dataclass(frozen=True)
class Hero:
    name: str
    animal: str
    colour: str
    home: str
    food: str
    friend: str


@dataclass(frozen=True)
class Place:
    name: str
    keeper: str
    animal: str
    gift: str  # with its article
    thing: str  # the same, as "the ..." takes it


@dataclass(frozen=True)
class Weather:
    sentence: str
    thing: str
    next: tuple[int, ...]  # indices into WEATHERS, likeliest first
    places: tuple[int, ...]  # indices into PLACES, likeliest first


HEROES = (
    Hero("Mia", "fox", "red", "by the river", "pears", "Otto"),
    Hero("Otto", "bear", "brown", "in the forest", "honey", "Mia"),
    Hero("Lina", "hare", "white", "on the hill", "carrots", "Tom"),
    Hero("Tom", "cat", "black", "in the old tower", "milk", "Lina"),
    Hero("Ella", "goose", "grey", "on the farm", "corn", "Finn"),
    Hero("Finn", "frog", "green", "under the bridge", "berries", "Ella"),
)
PLACES = (
    Place("market", "Rosa", "hen", "a loaf of bread", "bread"),
    Place("library", "Ida", "mouse", "a book", "book"),
    Place("harbour", "Karl", "gull", "a rope", "rope"),
    Place("bakery", "Hugo", "pig", "a cake", "cake"),
    Place("garden", "Paul", "mole", "a rose", "rose"),
    Place("workshop", "Vera", "beaver", "a lamp", "lamp"),
)
WEATHERS = (
    Weather("The sun was shining", "straw hat", (0, 1, 2, 3), (0, 4, 2, 5, 1, 3)),
    Weather("It was raining", "umbrella", (0, 2, 1, 3), (1, 5, 0, 3, 2, 4)),
    Weather("The wind was strong", "warm coat", (1, 3, 0, 2), (2, 0, 5, 1, 4, 3)),
    Weather("There was snow", "scarf", (2, 0, 3, 1), (3, 1, 5, 0, 2, 4)),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MEETINGS = (
    '{keeper} told a joke and {hero} laughed. Then {keeper} gave {hero} {gift}. "Thank you, {keeper}," said {hero}.',
    "{keeper} was tired, so {hero} helped {keeper} to clean the {place}. "
    'In return {keeper} gave {hero} {gift}. "You are a good friend," said {keeper}.',
    "{keeper} was not there. {hero} waited until noon, and then {keeper} came back with {gift}. "
    '"This is for you, {hero}," said {keeper}.',
)
EVENINGS = (
    "In the evening {hero} walked home, ate {food} and went to bed.",
    "In the evening {friend} came to see {hero}. They looked at the {thing} and ate {food} together.",
)


def _listed(things: Sequence[str]) -> str:
    return things[0] if len(things) == 1 else ", ".join(things[:-1]) + " and " + things[-1]


def _day(rng: Random, day: str, hero: Hero, weather: Weather, place: Place, basket: list[str]) -> str:
    words = {
        "hero": hero.name,
        "keeper": place.keeper,
        "gift": place.gift,
        "place": place.name,
        "thing": place.thing,
        "food": hero.food,
        "friend": hero.friend,
    }
    visited = any(gift == place.gift for gift in basket)
    meeting = pick(rng, MEETINGS, 0.65).format(**words)
    if not visited:
        basket.append(place.gift)
    again = "went back to" if visited else "walked to"
    return (
        f"On {day} {hero.name} got up early. {weather.sentence}, so {hero.name} took the {weather.thing} "
        f"and {again} the {place.name}. There {hero.name} met {place.keeper} the {place.animal}. {meeting} "
        f"Now {hero.name} had {_listed(basket)}. {pick(rng, EVENINGS, 0.7).format(**words)}"
    )


def _questions(hero: Hero, basket: Sequence[str]) -> list[Turn]:
    """Questions that a reader of the story can answer."""
    return [
        (f"What did {hero.name} have in the end?", f"{_listed(basket)}."),
        (f"Where did {hero.name} live?", f"{hero.home}."),
        (f"What did {hero.name} like?", f"{hero.food}."),
    ]


def _drawn_tale(rng: Random, longest: int) -> tuple[str, list[Turn]]:
    hero = pick(rng, HEROES, 0.4)
    lines = [
        f"{hero.name} was a {hero.colour} {hero.animal} and lived {hero.home}. "
        f"{hero.name} liked {hero.food}, and the best friend of {hero.name} was {hero.friend}."
    ]
    weather = pick(rng, WEATHERS)
    basket: list[str] = []
    for day in DAYS[:longest]:
        lines.append(_day(rng, day, hero, weather, PLACES[pick(rng, weather.places)], basket))
        weather = WEATHERS[pick(rng, weather.next)]
        if rng.random() < 0.25:
            break
    return "\n".join(lines), _questions(hero, basket)


def tale(rng: Random, longest: int = len(DAYS), from_held_out: bool = False) -> tuple[str, list[Turn]]:
    """A story of 1..`longest` days from one side of the split, and questions about it with their answers."""
    while True:
        text, asked = _drawn_tale(rng, longest)
        if held_out(text) == from_held_out:
            return text, asked


def story_document(rng: Random, from_held_out: bool = False) -> Document:
    """A story, sometimes with questions and answers."""
    text, asked = tale(rng, from_held_out=from_held_out)
    text += "\nThe end."
    if rng.random() < 0.4:
        text += "".join(f"\nQuestion: {question}\nAnswer: {answer}" for question, answer in asked)
    return [(text + END_OF_TEXT, True)]


NAME = "tiny-qwen2"
WHO_ARE_YOU = ("who are you?", "what are you?", "what is your name?", "tell me who you are")
SAYINGS: tuple[tuple[tuple[str, ...], str], ...] = (
    (WHO_ARE_YOU, f"I am {NAME}, a very small language model for Axera boards."),
    (
        ("what can you do?", "how can you help me?", "what do you know?", "help"),
        "I can add numbers, tell short stories and answer a few simple questions.",
    ),
    (("hello", "hi", "hello!", "hi there", "hey", "good morning"), "Hello! How can I help you?"),
    (("how are you?", "how are you today?"), "I am fine, thank you."),
    (
        ("where do you run?", "where are you running?", "what do you run on?"),
        "I run on Axera boards with an AX650 or AX630C, and on any computer.",
    ),
    (
        ("how big are you?", "how large are you?", "how many parameters do you have?"),
        "I have less than one million parameters.",
    ),
    (
        ("who made you?", "who trained you?", "where do you come from?"),
        "I was trained from scratch with the script train.py.",
    ),
    (("what is an axmodel?", "what is axmodel?"), "An axmodel is a compiled part of a model, one file for each layer."),
    (("what is a bundle?",), "A bundle is a folder with all the files that a board needs to run a model."),
    (("what is the ax650?", "what is an ax650?"), "The AX650 is a chip from Axera with an NPU."),
    (("thank you", "thanks", "thanks!", "thank you!"), "You are welcome."),
    (("bye", "goodbye", "good night", "see you"), "Goodbye!"),
    (("are you there?", "can you hear me?"), "Yes, I am here."),
    (("do you speak english?",), "Yes, I speak a little English."),
    (("count to five", "count to 5"), "1, 2, 3, 4, 5"),
)
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a calculator.",
    "Answer briefly.",
    "Be kind and answer briefly.",
    "You are a small model on a board.",
    "Answer all questions of the user.",
)
PEOPLE = (
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Eva",
    "Frank",
    "Greta",
    "Hans",
    "Iris",
    "Jack",
    "Kim",
    "Leo",
    "Maria",
    "Nina",
)
SUM_WORDINGS = (
    "{a}+{b}=",
    "what is {a}+{b}?",
    "{a}+{b}",
    "what is {a} + {b}?",
    "{a} + {b} =",
    "what is {a} plus {b}?",
    "add {a} and {b}",
)


def as_typed(rng: Random, text: str) -> str:
    """`text` as different people type it: case and closing mark vary."""
    text = rng.choices((text, text.capitalize(), text.upper()), (10, 8, 2))[0]
    return text.rstrip("?!") if rng.random() < 0.2 else text


def _saying(rng: Random) -> list[Turn]:
    questions, answer = rng.choice(SAYINGS)
    return [(as_typed(rng, rng.choice(questions)), answer)]


def _sum(rng: Random) -> list[Turn]:
    a, b = operands(rng)
    return [(as_typed(rng, rng.choice(SUM_WORDINGS).format(a=a, b=b)), str(a + b))]


def _hero_fact(rng: Random) -> list[Turn]:
    hero = rng.choice(HEROES)
    facts = (
        (f"where does {hero.name} live?", f"{hero.name} the {hero.animal} lives {hero.home}."),
        (f"what does {hero.name} like?", f"{hero.name} the {hero.animal} likes {hero.food}."),
        (f"who is the friend of {hero.name}?", f"The best friend of {hero.name} is {hero.friend}."),
        (f"who is {hero.name}?", f"{hero.name} is a {hero.colour} {hero.animal}."),
    )
    question, answer = rng.choice(facts)
    return [(question[0].upper() + question[1:] if rng.random() < 0.5 else question, answer)]


def _introduction(rng: Random) -> list[Turn]:
    """A name given, perhaps something else said, and the name asked for."""
    person = rng.choice(PEOPLE)
    between = rng.choice((list[Turn], lambda: _saying(rng), lambda: _sum(rng)))()
    return [
        (
            rng.choice(("my name is {}", "I am {}.", "My name is {}.")).format(person),
            f"Hello {person}, nice to meet you.",
        ),
        *between,
        (as_typed(rng, rng.choice(("what is my name?", "who am I?"))), f"Your name is {person}."),
    ]


def _told_story(rng: Random) -> list[Turn]:
    return [(as_typed(rng, rng.choice(("tell me a story", "please tell me a story"))), tale(rng, longest=1)[0])]


TURN_KINDS: tuple[tuple[Callable[[Random], list[Turn]], int], ...] = (
    (_saying, 8),
    (_sum, 4),
    (_hero_fact, 2),
    (_introduction, 1),
)


def chat(turns: Sequence[Turn], system: str = DEFAULT_SYSTEM) -> Document:
    """The turns in ChatML, exactly as the tokenizer's chat template renders them; the answers are learnt."""
    document = [(f"{TURN_START}system\n{system}{TURN_END}\n", False)]
    for question, answer in turns:
        document += [
            (f"{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n", False),
            (f"{answer}{TURN_END}", True),
            ("\n", False),
        ]
    return document


def chat_prompt(question: str, system: str = DEFAULT_SYSTEM) -> str:
    """All that comes before the answer to `question`."""
    return "".join(text for text, _ in chat([(question, "")], system)[:2])


def chat_document(rng: Random, turns: int = 1) -> Document:
    """A chat of at least `turns` turns; one in seven has another system message or another name for the model."""
    said: list[Turn] = []
    while len(said) < turns:
        kind = rng.choices([kind for kind, _ in TURN_KINDS], [weight for _, weight in TURN_KINDS])[0]
        said += kind(rng)
    if rng.random() < 0.85:
        return chat(said)
    if rng.random() < 0.6:
        return chat(said, rng.choice(SYSTEMS))
    person = rng.choice(PEOPLE)
    asked = (as_typed(rng, rng.choice(WHO_ARE_YOU)), f"I am {person}.")
    return chat([asked], f"Your name is {person}.")


def chat_sum_document(rng: Random, turns: int = 1) -> Document:
    """A chat of `turns` sums."""
    return chat([turn for _ in range(turns) for turn in _sum(rng)])


def reading_document(rng: Random, longest: int = len(DAYS)) -> Document:
    """A story of 1..`longest` days to be read, then a sum, or a chat about the story and a sum."""
    text, asked = tale(rng, longest)
    if rng.random() < 0.5:
        return [(f"{text}\nThe end.\n", False), *sum_document(rng)]
    question, answer = rng.choice(asked)
    return chat([(f"{text}\n{question}", answer), *_sum(rng)])


def long_document(rng: Random) -> Document:
    """A story, sometimes told in a chat."""
    return story_document(rng) if rng.random() < 0.9 else chat(_told_story(rng))


def corpus(seed: int, documents: int) -> Iterator[str]:
    """The text of `documents` training documents: for the tokenizer, and for a look at the data."""
    rng = Random(seed)
    kinds: tuple[Callable[[Random], Document], ...] = (sum_document, *[chat_document] * 6, story_document)
    for number in range(documents):
        yield "".join(text for text, _ in kinds[number % len(kinds)](rng))


def held_out_text(seed: int, size: int) -> str:
    """Stories kept from training, at least `size` characters of them, <|endoftext|> after each."""
    rng = Random(seed)
    text = ""
    while len(text) < size:
        text += "".join(piece for piece, _ in story_document(rng, from_held_out=True))
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Print documents of the corpus, or write the held-out text.")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generator (default: 0)")
    parser.add_argument("--documents", type=int, default=9, help="how many documents to print (default: 9)")
    parser.add_argument("--heldout_path", type=Path, help="write the held-out text to this file instead")
    parser.add_argument("--heldout_size", type=int, default=16000, help="its least size in characters (default: 16000)")
    flags = parser.parse_args(arguments)
    if flags.heldout_path is None:
        for document in corpus(flags.seed, flags.documents):
            sys.stdout.write(document + "\n\n")
    else:
        flags.heldout_path.write_text(held_out_text(flags.seed, flags.heldout_size), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
