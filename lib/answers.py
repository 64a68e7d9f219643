"""The fields of a model's answer, which is JSON or nearly so. No torch in this file.

docs/differences.md says what is accepted.
"""
import json
import re
from itertools import islice

MAX_ANSWER = 10_000  # characters read of an answer
MAX_TRIES = 10  # places in a text where the value of one key is looked for
THOUGHT, END_OF_THOUGHT = "<think>", "</think>"  # as Qwen3, SmolLM3 and DeepSeek-R1 write them
CUT_OFF = "(no answer: the thoughts were cut off)"  # stands for the answer
QUOTED = re.compile(r"'((?:[^'\\]|\\.)*)'|\"([^\"]*)\"", re.DOTALL)
LISTED = re.compile(r"\[([^\]]*)\]")


def final_answer(text):
    """What a model answers after its thoughts, which never count; CUT_OFF if they do not end."""
    thoughts, end, answer = text.rpartition(END_OF_THOUGHT)
    if THOUGHT in answer:
        return CUT_OFF
    return answer.lstrip() if end else answer


def _plain_keys(pairs):
    """A JSON object, its keys in lower case with spaces; the first of equal ones counts."""
    fields = {}
    for key, value in pairs:
        fields.setdefault(key.lower().replace("_", " "), value)
    return fields


DECODER = json.JSONDecoder(object_pairs_hook=_plain_keys, strict=False)


def read_fields(answer, kinds):
    """What an answer says under each key, never raising for a text.

    If it is a JSON object, the key may be in it or in one that it holds. Else the first
    `"key": value` in the text counts: there may be text around it, commas too many, single quotes.

    Args: answer: text; kinds: {key, in lower case: the type of its value, str or list}.
    Returns: {key: its first value of that type, or None}.
    """
    answer = answer[:MAX_ANSWER]
    objects, texts = [], [answer]
    data = _decoded(answer, DECODER.decode)
    if isinstance(data, dict):
        objects.append(data)
        for value in data.values():
            if isinstance(value, dict):
                objects.append(value)
            elif isinstance(value, str):  # may hold JSON in its turn
                texts.append(value)
    return {key: _field(key, kind, objects, texts) for key, kind in kinds.items()}


def _decoded(text, decode, *start):
    """The JSON value in a text, or None."""
    try:
        return decode(text, *start)
    except (ValueError, RecursionError):
        return None


def _field(key, kind, objects, texts):
    """The first value of its kind under a key, in the objects or else in the texts."""
    for found in objects:
        if isinstance(found.get(key), kind):
            return found[key]
    place = re.compile(rf"""["']{key.replace(" ", "[ _]")}["']\s*:\s*""", re.IGNORECASE)
    for text in texts:
        for match in islice(place.finditer(text), MAX_TRIES):
            value = _value(text, match.end())
            if isinstance(value, kind):
                return value
    return None


def _value(text, start):
    """The JSON value, the quoted text or the list of texts that starts here, or None."""
    found = _decoded(text, DECODER.raw_decode, start)
    if found is not None:
        return found[0]
    quoted = QUOTED.match(text, start)
    if quoted:
        return quoted[quoted.lastindex].replace("\\'", "'")
    listed = LISTED.match(text, start)
    if listed:
        items = listed[1].rstrip(", \r\n\t").split(",")
        return [item.strip(" \"'\r\n\t") for item in items]
    return None
