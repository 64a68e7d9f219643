"""Conversations as token ids, packed into few forward passes. Knows no model, no environment."""
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch


@dataclass
class Sequence:
    """Token ids of one conversation, its image, and the half-open spans [start, end) to score."""
    ids: list
    spans: list  # of the answers
    image: object = None  # PIL image or None

    def answered(self, answer):
        """This conversation and one more answer (ids)."""
        start = len(self.ids)
        span = (start, start + len(answer))
        return replace(self, ids=self.ids + answer, spans=[*self.spans, span])


class Packed(NamedTuple):
    """A conversation that holds several turns of a rollout, and which ones."""
    sequence: Sequence
    turns: list  # index of each span's turn in the rollout


def pack(turns):
    """Join (prompt, answer ids) of successive turns into as few Sequences as possible.

    A prompt is a Sequence without spans. A turn whose prompt extends the previous prompt + answer
    shares its Sequence, so that a conversation and its image are read once.
    Returns: list of Packed, in the order of the turns.
    """
    packed = []
    for index, (prompt, answer) in enumerate(turns):
        if packed and _extends(prompt, packed[-1].sequence):
            before = packed.pop()
            prompt = replace(prompt, spans=before.sequence.spans)
            packed.append(Packed(prompt.answered(answer), [*before.turns, index]))
        else:
            packed.append(Packed(prompt.answered(answer), [index]))
    return packed


def _extends(prompt, sequence):
    """Whether the prompt starts with the sequence and speaks of the same image.

    It does not where an earlier answer, as text, has other ids than those that were sampled.
    """
    same_image = prompt.image is sequence.image
    return same_image and prompt.ids[:len(sequence.ids)] == sequence.ids


def sequences_of(turns, slots):
    """Pack a rollout, environment by environment.

    Args: turns: list of Turns, each environment's in time order; slots: number of environments.
    Returns: list of Packed.
    """
    packed = []
    for slot in range(slots):
        own = [index for index, turn in enumerate(turns) if turn.slot == slot]
        for sequence, members in pack([(turns[i].prompt, turns[i].answer) for i in own]):
            packed.append(Packed(sequence, [own[member] for member in members]))
    return packed


def turns_of(packed):
    """Indices of the turns that Packed conversations hold, in the order that scoring keeps."""
    return [index for conversation in packed for index in conversation.turns]


def micro_batches(items, max_tokens):
    """Group items of like length, of at most max_tokens padded tokens a group (or one item each).

    Args: items: tuples whose first member is a Sequence.
    Returns: list of lists of items.
    """
    groups = []
    for item in sorted(items, key=_length):  # ascending: the newest item sets the width
        if groups and (len(groups[-1]) + 1) * _length(item) <= max_tokens:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def _length(item):
    return len(item[0].ids)


def shuffled_epochs(packed, epochs, size, generator):
    """Minibatches of so many passes over Packed conversations, each pass in an order of its own."""
    for _ in range(epochs):
        order = torch.randperm(len(packed), generator=generator).tolist()
        yield from minibatches([packed[i] for i in order], size)


def minibatches(packed, turns):
    """Successive groups of Packed conversations, each of at least `turns` turns.

    What is left at the end is a group if it has half of that, else it joins the last group.
    """
    groups, rest = [], []
    for conversation in packed:
        rest.append(conversation)
        if len(turns_of(rest)) >= turns:
            groups.append(rest)
            rest = []
    if groups and 2 * len(turns_of(rest)) < turns:
        groups[-1] += rest
    else:
        groups.append(rest)
    return groups
