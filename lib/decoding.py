"""A batch of prompts that a text model has read, continued token by token."""
import torch


class Decoding:
    """Args:
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


def join(parts):
    """One Decoding of several, rows one after the other; the parts give up their caches."""
    first, *others = parts
    _join_caches(first.cache, [part.cache for part in others])
    first.mask = torch.cat([part.mask for part in parts])
    first.position_offset = torch.cat([part.position_offset for part in parts])
    for name in first.further:
        first.further[name] = torch.cat([part.further[name] for part in parts])
    return first


def _join_caches(cache, others):
    """Append the rows of other caches layer by layer, so that one layer alone is there twice."""
    for layer, *more in zip(cache.layers, *(other.layers for other in others)):
        if not more or not layer.is_initialized:  # without an image cross-attention has no keys
            continue
        for kind in ("keys", "values"):
            setattr(layer, kind, torch.cat([getattr(part, kind) for part in (layer, *more)]))
            for part in more:
                setattr(part, kind, None)
