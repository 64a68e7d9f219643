"""A batch of prompts that a text model has read, continued token by token."""
import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer

ROOM = 32  # tokens that a cache has room for before it is copied once more


class GrowingLayer(DynamicLayer):
    """Keys and values (N, heads, T, C) that grow in place, where transformers' own copies all of
    them for every token."""

    def __init__(self, layer):
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        # allocated, T long or longer; self.keys and self.values are views of the part in use
        self.roomy = {"keys": layer.keys, "values": layer.values}
        self._show(layer.keys.shape[-2])

    def _show(self, length):
        for kind, states in self.roomy.items():
            setattr(self, kind, states[..., :length, :])

    def update(self, key_states, value_states, *args, **kwargs):
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        for kind, new in (("keys", key_states), ("values", value_states)):
            states = self.roomy[kind]
            if states.shape[-2] < end:
                room = new.new_empty(*states.shape[:-2], end + ROOM - start, states.shape[-1])
                states = torch.cat([getattr(self, kind), room], -2)  # (N, heads, end + ROOM, C)
                self.roomy[kind] = states
            states[..., start:end, :] = new
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        length = self.keys.shape[-2]
        self.roomy = {kind: states[indices] for kind, states in self.roomy.items()}
        self._show(length)


class Decoding:
    """Answers under way: what the text model has read of N conversations, a token more each step.

    Args:
        text_model: of the family.
        cache: transformers' key/value cache, a row per prompt.
        mask: (N, T) attention mask of what has been read.
        inputs: lib/families.TextInputs of the prompts.
    """

    def __init__(self, text_model, cache, mask, inputs):
        self.text_model = text_model
        self.cache = cache
        self.mask = mask
        self.further = inputs.further
        self.position_offset = inputs.position_offset  # (N, 1)

    def keep(self, rows):
        """Go on with these rows (indices) alone: finished answers stop costing."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]
        self.further = {name: tensor[rows] for name, tensor in self.further.items()}
        self.position_offset = self.position_offset[rows]

    def step(self, tokens):
        """Read one more token (N,) of each row. Returns: last hidden states (N, C)."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)  # (N, T + 1)
        position = self.mask.sum(1, keepdim=True) - 1 + self.position_offset  # (N, 1)
        out = self.text_model(input_ids=tokens[:, None], attention_mask=self.mask,
                              position_ids=position, past_key_values=self.cache, use_cache=True,
                              **self.further)
        return out.last_hidden_state[:, -1]  # (N, 1, C) -> (N, C)


def truncated(logits, top_p):
    """Logits (N, V), those of tokens outside the nucleus at -inf: the smallest set of likeliest
    tokens stays whose probabilities sum to at least top_p. Source: arXiv 1904.09751."""
    probabilities, order = torch.softmax(logits, -1).sort(-1, descending=True)
    likelier = probabilities.cumsum(-1) - probabilities  # what those before a token sum to
    outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, likelier >= top_p)
    return logits.masked_fill(outside, -torch.inf)


def join(parts):
    """One Decoding of several, rows one after the other; the parts give up their caches, whose
    layers are from now on GrowingLayers."""
    first = parts[0]
    width = max(part.mask.shape[1] for part in parts)  # T
    masks = [pad(part.mask, (width - part.mask.shape[1], 0)) for part in parts]  # on the left
    first.mask = torch.cat(masks)  # (N, T)
    first.position_offset = torch.cat([part.position_offset for part in parts])  # (N, 1)
    for name in first.further:
        first.further[name] = torch.cat([part.further[name] for part in parts])
    _join_caches([part.cache for part in parts])
    return first


def _join_caches(caches):
    """Append the rows of all caches to the first, layer by layer: at most one layer is in memory
    twice."""
    first = caches[0].layers
    for number, layer in enumerate(first):
        if not layer.is_initialized:  # without an image cross-attention has no keys
            continue
        layers = [cache.layers[number] for cache in caches]
        for kind in ("keys", "values"):
            states = [getattr(one, kind) for one in layers]  # (rows, heads, T of the part, C)
            for one in layers:
                setattr(one, kind, None)
            setattr(layer, kind, _joined(states))
        first[number] = GrowingLayer(layer)


def _joined(states):
    """Keys or values (rows, heads, T, C) of parts as those of all rows, padded on the left."""
    if len(states) == 1:
        return states[0]
    width = max(part.shape[-2] for part in states)
    padded = []
    for part in states:
        missing = width - part.shape[-2]
        padded.append(pad(part, (0, 0, missing, 0)) if missing else part)
    return torch.cat(padded)  # (N, heads, T, C)
