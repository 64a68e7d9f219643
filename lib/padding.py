"""Sequences of token ids as padded batches."""
from typing import NamedTuple

import torch


def pad_left(prompts, pad_token):
    """Prompts that answers follow on the right. Returns: ids, attention mask, (N, T) each."""
    width = max(len(p.ids) for p in prompts)
    ids = torch.full((len(prompts), width), pad_token)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        start = width - len(prompt.ids)
        ids[row, start:] = torch.tensor(prompt.ids)
        mask[row, start:] = 1
    return ids, mask


def pad_right(sequences, pad_token):
    """Whole conversations. Returns: ids, attention mask, (B, T) each."""
    width = max(len(s.ids) for s in sequences)
    ids = torch.full((len(sequences), width), pad_token)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, :len(sequence.ids)] = torch.tensor(sequence.ids)
        mask[row, :len(sequence.ids)] = 1
    return ids, mask


class AnswerTokens(NamedTuple):
    """Where the S answers of a batch stand, with A tokens in all; all int64."""
    row: torch.Tensor  # (A,) of each answer token
    column: torch.Tensor  # (A,)
    answer: torch.Tensor  # (A,) which answer it belongs to, 0 .. S - 1
    state_row: torch.Tensor  # (S,) of the last token before each answer, where its value is read
    state_column: torch.Tensor  # (S,)


def answer_tokens(sequences, device):
    """AnswerTokens of sequences with spans, in the order of the sequences and their spans."""
    rows, columns, answers, state_rows, state_columns = [], [], [], [], []
    for row, sequence in enumerate(sequences):
        for start, end in sequence.spans:
            answers += [len(state_rows)] * (end - start)
            rows += [row] * (end - start)
            columns += range(start, end)
            state_rows.append(row)
            state_columns.append(start - 1)
    places = (rows, columns, answers, state_rows, state_columns)
    return AnswerTokens(*[torch.tensor(place, device=device) for place in places])
