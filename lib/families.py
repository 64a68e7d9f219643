"""The frozen base model: loaded or made of random weights, in 4 bits if asked, and what is peculiar to its family.

Families differ in how the text sees an image. A family is a class with

    parts                    {part: pattern of its parameters' names}, for model.tune and model.keep_unquantized
    reader                   the module that reads text (and sees) and returns hidden states
    expand(ids, image)       prompt ids with as many image tokens as the image takes
    patches(image)           how many patches the features have; tower_patches(image): that the tower works on
    encode(images)           per image a tuple of tensors: its features; looked_at(features): of how many patches
    prefill(ids, mask, f)    how whole prompts (B, T) with features f are read: keyword arguments of the reader, those of
                             each further token (tensors with a row per prompt), and the offset (B, 1) of its position

Another model that works like one of them needs a line in FAMILIES.
"""
import torch
from torch.nn.functional import pad
from transformers import BitsAndBytesConfig

from lib.settings import UserError

class CrossAttention:
    """Llama-3.2-Vision (Mllama): layers of their own let the text attend to the states of the prompt's one image."""
    parts = {"language": "model.language_model|lm_head", "projector": "model.multi_modal_projector",
             "vision": "model.vision_model"}

    def __init__(self, base, image_processor):
        self.model, self.reader, self.image_processor = base.model, base.model.language_model, image_processor
        self.dtype, self.token = base.dtype, base.config.image_token_index

    def expand(self, ids, image):
        return ids

    def patches(self, image):
        return self._pixels([image])["aspect_ratio_mask"].sum().item() * self.model.vision_model.num_patches

    def tower_patches(self, image):
        return self.model.vision_model.max_num_tiles * self.model.vision_model.num_patches  # unused tiles as well

    def _pixels(self, images):
        return self.image_processor([[image] for image in images], return_tensors="pt")

    def encode(self, images):
        """Returns: per image ((tiles in use, patches, C),): unused tiles, which nothing may attend to, are dropped."""
        pixels = self._pixels(images).to(self.model.device)
        out = self.model.vision_model(pixel_values=pixels["pixel_values"].to(self.dtype),
                                      aspect_ratio_ids=pixels["aspect_ratio_ids"],
                                      aspect_ratio_mask=pixels["aspect_ratio_mask"])
        states = self.model.multi_modal_projector(out.last_hidden_state).squeeze(1)  # (B, tiles, patches, C)
        return [(s[:n].clone(),) for s, n in zip(states, pixels["aspect_ratio_mask"].sum((1, 2)).tolist())]

    def looked_at(self, features):
        return features[0].shape[0] * features[0].shape[1]

    def prefill(self, ids, mask, features):
        tiles = torch.tensor([len(states) for states, in features], device=ids.device)
        most = int(tiles.max())
        states = torch.stack([s if len(s) == most else pad(s, (0, 0, 0, 0, 0, most - len(s))) for s, in features])
        unused = (torch.arange(most, device=ids.device) >= tiles[:, None]).repeat_interleave(states.shape[2], 1)
        bias = torch.zeros(unused.shape, dtype=self.dtype, device=ids.device)  # (B, most * patches)
        bias = bias.masked_fill(unused, torch.finfo(self.dtype).min)[:, None, None]
        # never None, where sdpa would read causally. The few tokens before the image attend to it all the same, but skip the
        # layer's MLP: so transformers reads the model too, by a mask that is B x T x patches large
        after = ((ids == self.token).cumsum(1) > 0).to(self.dtype)[:, None, :, None]  # (B, 1, T, 1)
        whole = {"input_ids": ids, "position_ids": positions(mask), "cross_attention_states": states.flatten(0, 1),
                 "cross_attention_mask": bias, "full_text_row_masked_out_mask": after}
        return whole, {"cross_attention_mask": bias}, torch.zeros_like(ids[:, :1])  # the rest is in the cache


class Inline:
    """Qwen2.5-VL and Qwen3-VL: the patches of an image stand among the text tokens, at positions in three dimensions."""
    parts = {"language": "model.language_model|lm_head", "projector": r"model.visual\.(?:merger|deepstack_merger_list)",
             "vision": r"model.visual(?!\.merger|\.deepstack)"}

    def __init__(self, base, image_processor):
        self.model, self.reader, self.image_processor = base.model, base.model.language_model, image_processor
        self.token, self.merged = base.config.image_token_id, image_processor.merge_size ** 2  # patches per image token

    def expand(self, ids, image):
        if image is None:
            return ids
        place = ids.index(self.token)
        return ids[:place] + [self.token] * (self.patches(image) // self.merged) + ids[place + 1:]

    def patches(self, image):
        return self.image_processor.get_number_of_image_patches(image.height, image.width, {})

    tower_patches = patches

    def encode(self, images):
        """Returns: per image (embeddings (tokens, C), grid (3,) of patches, embeddings for deeper layers (tokens, C) ..)."""
        pixels = self.image_processor(images, return_tensors="pt").to(self.model.device)
        out = self.model.get_image_features(pixels["pixel_values"], pixels["image_grid_thw"], return_dict=True)
        sizes = [len(embeddings) for embeddings in out.pooler_output]
        deeper = [layer.split(sizes) if torch.is_tensor(layer) else layer  # as of transformers 5.17 and 5.23
                  for layer in getattr(out, "deepstack_features", ())]
        return list(zip(out.pooler_output, pixels["image_grid_thw"], *deeper))

    def looked_at(self, features):
        return features[1].prod().item()

    def prefill(self, ids, mask, features):
        embeddings, grids, *deeper = zip(*features)
        image = ids == self.token  # (B, T)
        embedded = self.model.get_input_embeddings()(ids)  # (B, T, C)
        embedded = embedded.masked_scatter(image[:, :, None], torch.cat(embeddings).to(embedded.dtype))
        where, offset = self.model.get_rope_index(ids, image.int(), image_grid_thw=torch.stack(grids), attention_mask=mask)
        whole = {"inputs_embeds": embedded, "position_ids": where}  # (3, B, T)
        if deeper:
            whole.update(visual_pos_masks=image, deepstack_visual_embeds=[torch.cat(layer) for layer in deeper])
        return whole, {}, offset


FAMILIES = {"mllama": CrossAttention, "qwen2_5_vl": Inline, "qwen3_vl": Inline}  # by model_type


def positions(mask):
    """Position ids of a padded batch, (B, T) from its attention mask."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def family(config):
    """The class of FAMILIES for a model's configuration. Raises: UserError."""
    if config.model_type not in FAMILIES:
        raise UserError(f"model.path: {config.model_type} is none of the known families, {', '.join(FAMILIES)} "
                        "(backbone.py)")
    return FAMILIES[config.model_type]


def quantization(model, config):
    """transformers' settings of 4-bit NF4 with double quantisation, or None."""
    if model.quantization == "none":
        return None
    parts = family(config).parts
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=getattr(torch, model.dtype),
                              llm_int8_skip_modules=[parts.get(name, name) for name in model.keep_unquantized])
