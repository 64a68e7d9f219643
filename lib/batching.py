"""Conversations as token ids, packed into few forward passes. Knows neither model nor environment."""
from dataclasses import dataclass, replace


@dataclass
class Sequence:
    """Token ids of one conversation, the image they speak of, and the half-open spans [start, end) of answers to score."""
    ids: list
    spans: list
    image: object = None  # PIL image or None

    def answered(self, answer):
        """This conversation and one more answer (ids)."""
        return replace(self, ids=self.ids + answer, spans=[*self.spans, (len(self.ids), len(self.ids) + len(answer))])


def pack(turns):
    """Join (prompt, answer ids) of successive turns into as few Sequences as possible; a prompt is a Sequence.

    A turn whose prompt extends the previous prompt + answer shares its Sequence, so that a conversation is read, and its
    image looked at, once.
    Returns: list of (Sequence, indices of its turns). Order is kept.
    """
    packed = []
    for index, (prompt, answer) in enumerate(turns):
        before, members = packed[-1] if packed else (None, [])
        if before and prompt.image is before.image and prompt.ids[:len(before.ids)] == before.ids:
            packed[-1] = replace(prompt, spans=before.spans).answered(answer), [*members, index]
        else:
            packed.append((prompt.answered(answer), [index]))
    return packed


def micro_batches(items, max_tokens):
    """Groups of (Sequence, ...) items of like length whose padded size is at most max_tokens (or one item each)."""
    groups = []
    for item in sorted(items, key=lambda item: len(item[0].ids)):  # ascending: the newest item sets the width
        if groups and (len(groups[-1]) + 1) * len(item[0].ids) <= max_tokens:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def sequences_of(turns, slots):
    """Conversations in the fewest passes: [(Sequence, turn indices)], turns of a table in time order."""
    packed = []
    for slot in range(slots):
        mine = [i for i, t in enumerate(turns) if t.slot == slot]
        packed += [(s, [mine[m] for m in members]) for s, members in pack([(turns[i].prompt, turns[i].answer)
                                                                           for i in mine])]
    return packed


def minibatches(packed, turns):
    """Successive groups of packed conversations with at least `turns` turns each; a small rest joins the last."""
    groups, count = [[]], 0
    for item in packed:
        if count >= turns:
            groups.append([])
            count = 0
        groups[-1].append(item)
        count += len(item[1])
    if len(groups) > 1 and 2 * count < turns:
        rest = groups.pop()
        groups[-1] += rest
    return groups
