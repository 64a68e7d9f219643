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
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    caches, masks, offsets = [], [], []
    for part in parts:
        caches.append(part.cache)
        masks.append(part.mask)
        offsets.append(part.position_offset)
    _join_caches(caches)
    first.mask = torch.cat(masks)  # (N, T)
    first.position_offset = torch.cat(offsets)  # (N, 1)
    for name in first.further:
        first.further[name] = torch.cat([part.further[name] for part in parts])
    return first


def _join_caches(caches):
    """Append the rows of all caches to the first, layer by layer: only one is there twice."""
    for number, layer in enumerate(caches[0].layers):
        if not layer.is_initialized:  # without an image cross-attention has no keys
            continue
        layers = [cache.layers[number] for cache in caches]
        for kind in ("keys", "values"):
            joined = torch.cat([getattr(one, kind) for one in layers])
            for one in layers:
                setattr(one, kind, None)
            setattr(layer, kind, joined)
