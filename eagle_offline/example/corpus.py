"""Generates the example's chat corpus from a seed; knows nothing of tokenizers or models.

Nine task families share one vocabulary of names, things and places, so that answers mix fixed wording with parts
that must be copied, looked up or computed. Whatever an answer says, its wording included, follows from the
conversation before it: greedy decoding of a well trained target can be compared with it word for word.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from eagle_offline.durable import make_directory, write_bytes


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_NAMES = _words("Ada Ben Cara Dan Eva Finn Iris Leo Mona Nils Paul Rosa")
_THINGS = _words("apple book coin drum fork hat key lamp map pen ring ship")
_PLACES = _words("attic barn garden hall kitchen library office tower")
_JOBS = _words("baker doctor farmer guide judge nurse painter teacher")
_CITIES = _words("Bern Cork Delft Lyon Malmo Oslo Porto Riga")
_DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
_MONTHS = _words("January February March April May June July August September October November December")
_UNITS = (("weeks", "days", 7), ("days", "hours", 24), ("years", "months", 12), ("hours", "minutes", 60),
          ("dozens", "pieces", 12), ("meters", "centimeters", 100), ("boxes", "bottles", 6))  # fmt: skip
_NOUNS = {"bird": "pilo", "cat": "miru", "dog": "vako", "fish": "suna", "horse": "taro", "king": "rega",
          "queen": "rela", "child": "nino"}  # fmt: skip
_ADJECTIVES = {"old": "zem", "young": "lif", "red": "kor", "white": "bal", "small": "tip", "big": "gon"}
_VERBS = {"sees": "ota", "finds": "ema", "follows": "usi", "helps": "ilu", "calls": "abo"}
_TOPICS = {
    "the garden fair": ("The tables will stand under the old trees", "please bring cups and plates for the guests"),
    "the school play": ("The children have learned every line by heart", "please help us to paint the last scene"),
    "the book club": ("We have read the first half of the story", "please choose the next book for the group"),
    "the boat trip": ("The boat leaves early and comes back at night", "please pack warm clothes and some bread"),
    "the town market": ("Many farmers will sell fruit and cheese", "please tell me how much room you need"),
    "the music night": ("Two singers and a drummer will play for us", "please reserve a seat near the stage"),
}
_CODE_STEPS = {
    "doubles it": "value = value * 2",
    "adds {n}": "value = value + {n}",
    "takes away {n}": "value = value - {n}",
    "keeps it below {n}": "value = min(value, {n})",
    "prints it": "print(value)",
    "saves it": "items.append(value)",
}


class _Turn(NamedTuple):
    """One exchange: the question, the working shown before the result, and the result."""

    question: str
    working: str
    result: str


class _Persona(NamedTuple):
    """A system turn and what it does to every answer of the conversation."""

    system: str
    opening: str
    closing: str
    shows_working: bool


_PLAIN = _Persona("", "", "", True)
_PERSONAS = (
    _Persona("You are Pip, a cheerful helper.", "Sure, happy to help! ", " Is there anything else?", True),
    _Persona("You are a polite clerk of the town library.", "Certainly. ", " I remain at your service.", True),
    _Persona("Explain every step before you give the result.", "Let me go step by step. ", "", True),
    _Persona("Give only the result, in one sentence.", "", "", False),
)
# Working that a small model needs in order to reach the result at all is shown whatever the system turn says.
_NEEDS_WORKING = frozenset({"arithmetic", "units", "lists", "code", "translation", "letters"})


def _num_follow_ups(rng: random.Random) -> int:
    """Return how many questions follow the first: mostly none or one, seldom up to six."""
    return min(6, int(rng.expovariate(1.1)))


def _add(first: int, second: int) -> str:
    ones, carry = first % 10 + second % 10, (first % 10 + second % 10) // 10
    tens = f"{first // 10} + {second // 10}" + (" + 1" if carry else "")
    total = first // 10 + second // 10 + carry
    return f"Ones: {first % 10} + {second % 10} = {ones}{', carry 1' if carry else ''}. Tens: {tens} = {total}."


def _subtract(first: int, second: int) -> str:
    borrow = first % 10 < second % 10
    ones = first % 10 + 10 * borrow
    tens = f"{first // 10} - {second // 10}" + (" - 1" if borrow else "")
    left = first // 10 - second // 10 - borrow
    return (
        f"Ones: {ones} - {second % 10} = {ones - second % 10}{', borrow 1' if borrow else ''}. Tens: {tens} = {left}."
    )


def _arithmetic(rng: random.Random) -> Iterator[_Turn]:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS) + "s"
    total = rng.randint(11, 79)
    opening = rng.choice((f"{name} has {total} {thing}.", f"There are {total} {thing} on the table of {name}."))
    for _ in range(1 + _num_follow_ups(rng)):
        grows = rng.random() < 0.55 if 30 <= total < 75 else total < 30
        change = rng.randint(2, 98 - total) if grows else rng.randint(2, total - 10)
        action, verb = rng.choice(
            (("buys", "bought"), ("finds", "found")) if grows else (("sells", "sold"), ("loses", "lost"))
        )
        question = f"{opening} {name} {action} {change}{' more' if grows else ' of them'}. How many are left now?"
        working = f"{name} had {total} {thing} and {verb} {change}. "
        working += _add(total, change) if grows else _subtract(total, change)
        total += change if grows else -change
        yield _Turn(question.strip(), working, f"So {name} now has {total} {thing}.")
        opening = rng.choice(("", "Then"))


def _lists(rng: random.Random) -> Iterator[_Turn]:
    items = rng.sample(_THINGS, rng.choice((3, 3, 4, 4, 5, 6, 8)))
    opening = f"{rng.choice(('Here is my list', 'I wrote down', 'Take this list'))}: {', '.join(items)}. "
    for _ in range(1 + _num_follow_ups(rng)):
        edit = rng.choice(("reverse", "sort", "drop", "append", "swap"))
        subject = rng.choice(items if edit == "drop" else [thing for thing in _THINGS if thing not in items])
        if edit == "reverse":
            request, items, done = "Turn it around.", items[::-1], "I turned the list around"
        elif edit == "sort":
            request, items, done = "Sort it by the alphabet.", sorted(items), "I sorted the list"
        elif edit == "drop" and len(items) > 2:
            request, done = f"Take out the {subject}.", f"I took out the {subject}"
            items = [item for item in items if item != subject]
        elif edit == "append":
            request, items, done = f"Put {subject} at the end.", [*items, subject], f"I put {subject} at the end"
        else:
            request, done = "Swap the first and the last.", f"I swapped {items[0]} and {items[-1]}"
            items = [items[-1], *items[1:-1], items[0]]
        numbered = "\n".join(f"{place}. {item}" for place, item in enumerate(items, 1))
        result = f"It starts with {items[0]}, ends with {items[-1]} and has {len(items)} items."
        yield _Turn(opening + request, f"{done}:\n{numbered}\n", result)
        opening = rng.choice(("", "Good. ", "Now "))


def _story(rng: random.Random) -> Iterator[_Turn]:
    people, things = rng.sample(_NAMES, 3), rng.sample(_THINGS, 2)
    places = dict.fromkeys(things, "")
    events, last = [], {}
    for number in range(rng.randint(3, 6)):
        thing = things[number] if number < 2 else rng.choice(things)
        person, place = rng.choice(people), rng.choice([place for place in _PLACES if place != places[thing]])
        moved = f"moved the {thing} from the {places[thing]} to the {place}"
        events.append(f"{person} {moved if places[thing] else f'put the {thing} in the {place}'}.")
        last[thing] = (person, places[thing])
        places[thing] = place
    opening = f"Read this story. {' '.join(events)} "
    for thing in rng.sample(things, min(2, 1 + _num_follow_ups(rng))):
        person, origin = last[thing]
        source = f"moved it there from the {origin}" if origin else "put it there at the start"
        if rng.random() < 0.6:
            question, result = f"Where is the {thing} now?", f"The {thing} is in the {places[thing]} now."
        else:
            question, result = f"Who touched the {thing} last?", f"It was {person} who touched the {thing} last."
        working = f"The story says that the {thing} went to the {places[thing]}: {person} {source}."
        yield _Turn(opening + question, working, result)
        opening = ""


def _records(rng: random.Random) -> Iterator[_Turn]:
    size = rng.randint(3, 6)
    columns = (rng.sample(_NAMES, size), rng.sample(_JOBS, size), rng.sample(_CITIES, size))
    rows = list(zip(*columns, rng.sample(range(20, 80), size), strict=True))
    opening = "\n".join(["name | job | city | age", *(" | ".join(map(str, row)) for row in rows)]) + "\n"
    for _ in range(1 + _num_follow_ups(rng)):
        (name, job, city, age), (other, _, _, other_age) = rng.sample(rows, 2)
        question, working, result = rng.choice(
            (
                (
                    f"What is the job of {name}?",
                    f"The table has {name}, {age} years old, who works as a {job} in {city}.",
                    f"{name} is a {job}.",
                ),
                (
                    f"Who lives in {city}?",
                    f"The row with {city} belongs to a {job} of {age} years, and the name there is {name}.",
                    f"The person from {city} is {name}.",
                ),
                (
                    f"How can I find the {job}?",
                    f"The {job} in the table is {name}.",
                    f"Ask for {name} in {city}, who is {age} years old.",
                ),
                (
                    f"Who is older, {name} or {other}?",
                    f"{name} is {age} and {other} is {other_age}.",
                    f"So {name if age > other_age else other} is older.",
                ),
            )
        )
        yield _Turn(opening + question, working, result)
        opening = ""


def _calendar(rng: random.Random) -> Iterator[_Turn]:
    cycle, unit = (_DAYS, "day") if rng.random() < 0.6 else (_MONTHS, "month")
    position = rng.randrange(len(cycle))
    name = rng.choice(_NAMES)
    opening = f"{name} starts on {cycle[position]}." if unit == "day" else f"{name} starts in {cycle[position]}."
    for _ in range(1 + _num_follow_ups(rng)):
        count, forward = rng.randint(2, 6), rng.random() < 0.7
        where = "after" if forward else "before"
        passed = [cycle[(position + (step if forward else -step)) % len(cycle)] for step in range(1, count + 1)]
        question = f"{opening} Which {unit} is {count} {unit}s {where} that?"
        working = f"I count {count} {unit}s {'on' if forward else 'back'} from {cycle[position]}: {', '.join(passed)}."
        yield _Turn(question.strip(), working, f"The {unit} {count} {unit}s {where} {cycle[position]} is {passed[-1]}.")
        position = cycle.index(passed[-1])
        opening = rng.choice(("", "And then?"))


def _units(rng: random.Random) -> Iterator[_Turn]:
    large, small, factor = rng.choice(_UNITS)
    name, task = rng.choice(_NAMES), rng.choice(("plans", "needs", "counts"))
    count = rng.randint(2, 9)
    question = f"{name} {task} {count} {large}. How many {small} is that?"
    for _ in range(1 + _num_follow_ups(rng)):
        rule = f"{factor} {small} make one of the {large}"
        working = f"Since {rule}, we need {count} times {factor}: {count} x {factor} = {count * factor}."
        yield _Turn(question, working, f"In {count} {large} there are {count * factor} {small}.")
        count = rng.randint(2, 9)
        question = rng.choice((f"And for {count} {large}?", f"What if {name} {task} {count} {large}?"))


def _code(rng: random.Random) -> Iterator[_Turn]:
    function = f"{rng.choice(('check', 'count', 'price', 'score'))}_{rng.choice(_THINGS)}"
    phrases = [
        (phrase, line, rng.randint(2, 9)) for phrase, line in rng.sample(sorted(_CODE_STEPS.items()), rng.randint(1, 4))
    ]
    asked = ", then ".join(phrase.format(n=number) for phrase, _, number in phrases)
    question = f"Write a Python function {function} that takes a value, {asked}."
    for _ in range(1 + min(2, _num_follow_ups(rng))):
        body = "\n".join(f"    {line.format(n=number)}" for _, line, number in phrases)
        working = f"```python\ndef {function}(value):\n{body}\n    return value\n```\n"
        yield _Turn(question, working, f"The function {function} has {len(phrases) + 1} lines and returns the value.")
        if rng.random() < 0.5:
            function = f"{rng.choice(('make', 'update', 'read'))}_{rng.choice(_THINGS)}"
            question = f"Please name it {function}."
        else:
            phrase, line = rng.choice(sorted(_CODE_STEPS.items()))
            phrases.append((phrase, line, rng.randint(2, 9)))
            question = f"Add a last step that {phrase.format(n=phrases[-1][2])}."


def _translation(rng: random.Random) -> Iterator[_Turn]:
    lexicon = {**_NOUNS, **_ADJECTIVES, **_VERBS}
    opening = rng.choice(("Translate into Tovi:", "How do you say this in Tovi?", "In Tovi, please:"))
    for _ in range(1 + _num_follow_ups(rng)):
        (actor, patient), verb = rng.sample(sorted(_NOUNS), 2), rng.choice(sorted(_VERBS))
        first, second = rng.choices(("", *sorted(_ADJECTIVES)), k=2)
        words = [word for word in (first, actor, verb, second, patient) if word]
        english = " ".join(["the", *words[: words.index(verb) + 1], "the", *words[words.index(verb) + 1 :]])
        # Tovi puts the verb last and every adjective behind its noun.
        order = [word for word in (actor, first, patient, second, verb) if word]
        gloss = ", ".join(f"{word} is {lexicon[word]}" for word in words)
        tovi = " ".join(lexicon[word] for word in order)
        yield _Turn(f"{opening} {english}", f"Word by word: {gloss}. The verb goes last.", f"In Tovi: {tovi}.")
        opening = rng.choice(("And this:", "Next:"))


def _letters(rng: random.Random) -> Iterator[_Turn]:
    sender, reader, *helpers = rng.sample(_NAMES, rng.randint(3, 10))
    topic = rng.choice(sorted(_TOPICS))
    fact, wish = _TOPICS[topic]
    brought = " and ".join(f"{name} brings the {rng.choice(_THINGS)}" for name in helpers)
    day, place = rng.choice(_DAYS), rng.choice(_PLACES)
    formal = rng.random() < 0.5
    question = f"Write a {'formal' if formal else 'warm'} letter from {sender} to {reader} about {topic}. "
    question += f"It is on {day} in the {place}; {brought}."
    for _ in range(1 + min(2, _num_follow_ups(rng))):
        if formal:
            body = f"Dear {reader},\n\nI am writing about {topic}, which takes place on {day} in the {place}. "
            ending = f"With kind regards,\n{sender}"
        else:
            body = f"Hello {reader}!\n\nHave you heard about {topic}? It is on {day} in the {place}. "
            ending = f"See you on {day},\n{sender}"
        body += f"{fact}, and {brought}. If you can, {wish}."
        yield _Turn(question, body, f"We meet at the {place} on {day}.\n\n{ending}")
        if rng.random() < 0.5:
            day = rng.choice(_DAYS)
            question = f"Change the day to {day}."
        else:
            place = rng.choice(_PLACES)
            question = f"Use the {place} instead."


_FAMILIES: dict[str, Callable[[random.Random], Iterator[_Turn]]] = {
    "arithmetic": _arithmetic,
    "calendar": _calendar,
    "code": _code,
    "letters": _letters,
    "lists": _lists,
    "records": _records,
    "story": _story,
    "translation": _translation,
    "units": _units,
}
TASKS = (*_FAMILIES, "mixed")


def _draw_conversation(rng: random.Random) -> tuple[str, list[dict[str, str]]]:
    """Return a task and its messages; one conversation in eight strings two or three tasks together."""
    persona = _PLAIN if rng.random() < 0.5 else rng.choice(_PERSONAS)
    mixed = rng.random() < 0.125
    families = rng.sample(sorted(_FAMILIES), rng.randint(2, 3) if mixed else 1)
    messages = [{"role": "system", "content": persona.system}] if persona.system else []
    for family in families:
        for turn in _FAMILIES[family](rng):
            shown = persona.shows_working or family in _NEEDS_WORKING
            separator = "" if not shown or turn.working.endswith("\n") else " "
            answer = f"{turn.working if shown else ''}{separator}{turn.result}"
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": f"{persona.opening}{answer}{persona.closing}"})
    return "mixed" if mixed else families[0], messages


def generate_conversations(num_conversations: int, seed: int) -> Iterator[dict]:
    """Yield `num_conversations` different conversations that `seed` alone determines.

    Args:
        num_conversations: How many to yield. A shorter run of the same seed is a prefix of a longer one.
        seed: Seed of the one random generator everything is drawn from.

    Yields:
        `{"id", "task", "messages"}`: `task` is one of `TASKS`, `messages` an optional system turn followed by
        pairs of a user and an assistant turn, each `{"role", "content"}`. No two have the same messages.
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    while len(seen) < num_conversations:
        task, messages = _draw_conversation(rng)
        text = json.dumps(messages)
        if text not in seen:
            yield {"id": f"example-{len(seen):06d}", "task": task, "messages": messages}
            seen.add(text)


def write_conversations(file: Path | str, conversations: Iterable[dict]) -> None:
    """Write one JSON object per line; `file` appears complete or not at all."""
    file = Path(file)
    make_directory(file.parent)
    lines = (json.dumps(conversation, ensure_ascii=False) + "\n" for conversation in conversations)
    write_bytes(file, "".join(lines).encode())


def read_conversations(file: Path | str) -> list[dict]:
    """Return the conversations of a file that `write_conversations` wrote, in order."""
    with Path(file).open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def write_corpus(
    train_file: Path | str, heldout_file: Path | str, num_conversations: int, heldout_conversations: int, seed: int
) -> None:
    """Write two disjoint files of conversations; the same arguments give the same bytes.

    Args:
        train_file: JSONL file for the first `num_conversations` of the seed.
        heldout_file: JSONL file for the `heldout_conversations` that follow them.
        num_conversations: Lines of `train_file`.
        heldout_conversations: Lines of `heldout_file`.
        seed: See `generate_conversations`, which never repeats itself; hence the files share no conversation.
    """
    conversations = list(generate_conversations(num_conversations + heldout_conversations, seed))
    write_conversations(train_file, conversations[:num_conversations])
    write_conversations(heldout_file, conversations[num_conversations:])
