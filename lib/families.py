"""What is peculiar to a family of models: how its text sees an image, if it sees any.

A family is a class, made of (base, image_processor, tokenizer), with

    parts                               {part: pattern of its parameters' names}, for model.tune
    parts_in_float32                    those that float16 may overflow
    special_tokens                      that it spells images with and a dry run's tokenizer lacks
    text_model                          the module that reads text and returns hidden states
    image_token                         id of the token that stands for an image in a prompt
    expand_image_tokens(ids, image)     prompt ids with as many image tokens as the image takes
    image_patches(image)                how many patches the features of an image have
    tower_patches(image)                how many patches the vision tower works on
    encode_images(images)               per image a tuple of tensors, its features
    count_patches(features)             of how many patches one image's features are
    text_inputs(ids, mask, features)    how the text model reads whole prompts: TextInputs

Another model that works like one of them needs a line in FAMILIES; another way of seeing needs a
class of some 40 lines (docs/new_family.md). A language model without images is a TextOnly.
"""
import re
from dataclasses import dataclass
from functools import partial

import torch
import transformers
from accelerate import init_empty_weights
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from lib.errors import UserError

VERSION_4 = transformers.__version__.startswith("4.")  # its 4.57 does; requirements.txt has 5
AROUND = "<fake_token_around_image>"  # around each tile of SmolVLM
TILE_NAMES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]


@dataclass
class TextInputs:
    """Keyword arguments of the text model.

    prompt: with the whole prompts; further: with each token after them, tensors with a row per
    prompt; position_offset: (B, 1), of a further token's position beyond the number of tokens.
    """
    prompt: dict
    further: dict
    position_offset: torch.Tensor


def positions(mask):
    """Position ids of a padded batch, (B, T), from its attention mask (B, T)."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def text_only(ids, mask):
    """TextInputs of prompts without an image: every family reads them alike."""
    prompt = {"input_ids": ids, "position_ids": positions(mask)}
    return TextInputs(prompt, {}, torch.zeros_like(ids[:, :1]))


def with_images(family, ids, images):
    """Embeddings (B, T, C) of ids (B, T), those of images, (tokens, C) each, in their places."""
    embedded = family.model.get_input_embeddings()(ids)
    images = torch.cat(images).to(embedded.dtype)  # (all image tokens, C)
    return embedded.masked_scatter((ids == family.image_token)[:, :, None], images)


class CrossAttention:
    """Llama-3.2-Vision (Mllama): layers of their own let the text attend to one image's states."""
    parts = {"language": "model.language_model|lm_head",
             "projector": "model.multi_modal_projector",
             "vision": "model.vision_model"}
    parts_in_float32 = ("projector", "vision")
    special_tokens = []

    def __init__(self, base, image_processor, tokenizer):
        self.model = base.model
        self.text_model = base.model.language_model
        self.image_processor = image_processor
        self.dtype = base.dtype  # of the text
        self.image_token = base.config.image_token_index
        tower = self.model.vision_model
        for layer in [*tower.transformer.layers, *tower.global_transformer.layers]:
            # transformers checkpoints the text's layers alone; a picture's take 10 GiB in the 11B
            layer.forward = partial(_checkpointed, layer, layer.forward)

    def expand_image_tokens(self, ids, image):
        return ids

    def image_patches(self, image):
        tiles = self._pixels([image])["aspect_ratio_mask"].sum().item()
        return tiles * self.model.vision_model.num_patches

    def tower_patches(self, image):
        tower = self.model.vision_model
        return tower.max_num_tiles * tower.num_patches  # unused tiles as well

    def _pixels(self, images):
        return self.image_processor([[image] for image in images], return_tensors="pt")

    def encode_images(self, images):
        """Per image ((tiles in use, patches, C),); nothing may attend to unused tiles: dropped."""
        pixels = self._pixels(images)
        tiles = pixels["aspect_ratio_mask"].sum((1, 2)).tolist()
        pixels = pixels.to(self.model.device)
        tower = self.model.vision_model
        seen = tower(pixel_values=pixels["pixel_values"].to(tower.dtype),
                     aspect_ratio_ids=pixels["aspect_ratio_ids"],
                     aspect_ratio_mask=pixels["aspect_ratio_mask"])
        states = self.model.multi_modal_projector(seen.last_hidden_state).to(self.dtype)
        states = states.squeeze(1)  # (B, 1, tiles, patches, C) -> (B, tiles, patches, C)
        return [(state[:used].clone(),) for state, used in zip(states, tiles)]

    def count_patches(self, features):
        tiles, patches, _ = features[0].shape
        return tiles * patches

    def text_inputs(self, ids, mask, features):
        """TextInputs of prompts (B, T): image states beside the text, a mask for unused tiles."""
        states = [states for states, in features]
        tiles = torch.tensor([len(s) for s in states], device=ids.device)
        most = max(len(s) for s in states)
        padded = [s if len(s) == most else pad(s, (0, 0, 0, 0, 0, most - len(s))) for s in states]
        states = torch.stack(padded)  # (B, most, patches, C)
        # never None, where sdpa would read causally
        unused = torch.arange(most, device=ids.device) >= tiles[:, None]  # (B, most)
        unused = unused.repeat_interleave(states.shape[2], 1)  # (B, most * patches)
        bias = torch.zeros(unused.shape, dtype=self.dtype, device=ids.device)
        bias = bias.masked_fill(unused, torch.finfo(self.dtype).min)
        bias = bias[:, None, None]  # (B, 1, 1, most * patches), added to the attention scores
        # The few tokens before the image attend to it all the same, but skip the layer's MLP: so
        # transformers reads the model too, by a mask that is B x T x patches large.
        after_image = ((ids == self.image_token).cumsum(1) > 0).to(self.dtype)
        prompt = {"input_ids": ids, "position_ids": positions(mask),
                  "cross_attention_states": states.flatten(0, 1),  # (B * most, patches, C)
                  "cross_attention_mask": bias,
                  "full_text_row_masked_out_mask": after_image[:, None, :, None]}  # (B, 1, T, 1)
        further = {"cross_attention_mask": bias}  # the image's keys and values are in the cache
        return TextInputs(prompt, further, torch.zeros_like(ids[:, :1]))


def _checkpointed(layer, forward, **inputs):
    """The layer's forward pass, done again on the way back in training mode, which is the mode of
    gradient checkpointing here (Policy.score)."""
    if layer.training and torch.is_grad_enabled():
        return checkpoint(forward, use_reentrant=False, **inputs)
    return forward(**inputs)


class Inline:
    """Qwen2-VL, 2.5 and 3: an image's patches stand among the text tokens, in 3-D positions."""
    parts = {"language": "model.language_model|lm_head",
             "projector": r"model.visual\.(?:merger|deepstack_merger_list)",
             "vision": r"model.visual(?!\.merger|\.deepstack)"}
    parts_in_float32 = ("projector", "vision")
    special_tokens = []

    def __init__(self, base, image_processor, tokenizer):
        self.model = base.model
        self.text_model = base.model.language_model
        self.image_processor = image_processor
        self.dtype = base.dtype  # of the text
        self.image_token = base.config.image_token_id
        self.patches_per_token = image_processor.merge_size ** 2

    def expand_image_tokens(self, ids, image):
        if image is None:
            return ids
        place = ids.index(self.image_token)
        tokens = self.image_patches(image) // self.patches_per_token
        return ids[:place] + [self.image_token] * tokens + ids[place + 1:]

    def image_patches(self, image):
        return self.image_processor.get_number_of_image_patches(image.height, image.width, {})

    tower_patches = image_patches

    def encode_images(self, images):
        """Per image (embeddings (tokens, C), patches as a grid (3,), then embeddings (tokens, C)
        for each deeper layer that gets its own)."""
        pixels = self.image_processor(images, return_tensors="pt")
        grids = pixels["image_grid_thw"]  # (B, 3)
        pixels = pixels.to(self.model.device)
        out = self.model.get_image_features(pixels["pixel_values"], pixels["image_grid_thw"])
        first, further = _by_image(out)
        sizes = [len(embeddings) for embeddings in first]
        layers = [first]
        for layer in further:
            # one tensor up to transformers 5.17, already split by image in 5.23
            layers.append(layer.split(sizes) if torch.is_tensor(layer) else layer)
        embeddings, *deeper = [[each.to(self.dtype) for each in layer] for layer in layers]
        return list(zip(embeddings, grids, *deeper))

    def count_patches(self, features):
        grid = features[1]  # (3,)
        return grid.prod().item()

    def text_inputs(self, ids, mask, features):
        """TextInputs of prompts (B, T): image embeddings in the places of the image tokens."""
        embeddings, grids, *deeper = zip(*features)
        is_image = ids == self.image_token  # (B, T)
        embedded = with_images(self, ids, embeddings)
        where = self._positions(ids, mask, torch.stack(grids).to(ids.device))
        offset = where.amax((0, 2))[:, None] + 1 - mask.sum(1, keepdim=True)  # (B, 1)
        prompt = {"inputs_embeds": embedded, "position_ids": where}  # where: (3, B, T)
        if deeper:
            prompt["visual_pos_masks"] = is_image
            prompt["deepstack_visual_embeds"] = [torch.cat(layer) for layer in deeper]
        return TextInputs(prompt, {}, offset)

    def _positions(self, ids, mask, grids):
        """(3, B, T) of prompts (B, T) with one image each, whose patches are grids (B, 3). The
        offset that comes with them counts padding in transformers 4."""
        is_image = ids == self.image_token
        if not VERSION_4:
            return self.model.get_rope_index(ids, is_image.int(), image_grid_thw=grids,
                                             attention_mask=mask)[0]
        # it counts images by the token before them, which an answer may hold, too
        stray = (ids == self.model.config.vision_start_token_id) & ~is_image.roll(-1, 1)
        return self.model.get_rope_index(ids.masked_fill(stray, 0), image_grid_thw=grids,
                                         attention_mask=mask)[0]


def _by_image(out):
    """What Qwen's get_image_features returns, in transformers 5 or 4: embeddings of each image, and
    those of deeper layers (Qwen3-VL)."""
    if not isinstance(out, tuple):
        return out.pooler_output, getattr(out, "deepstack_features", ())
    deepstack = len(out) == 2 and isinstance(out[1], list)
    return out if deepstack else (out, ())


class Tiled:
    """SmolVLM and SmolVLM2 (Idefics3): an image is cut into rows and columns of tiles, a small copy
    of the whole follows, and each tile stands among the text tokens after one that names it."""
    parts = {"language": "model.text_model|lm_head",
             "projector": "model.connector",
             "vision": "model.vision_model"}
    parts_in_float32 = ("projector", "vision")
    special_tokens = [AROUND, "<global-img>", *TILE_NAMES]

    def __init__(self, base, image_processor, tokenizer):
        self.model = base.model
        self.text_model = base.model.text_model
        self.dtype = base.dtype  # of the text
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.image_token = base.config.image_token_id
        self.patches_per_token = base.config.scale_factor ** 2
        self.tile_tokens = self.model.vision_model.embeddings.num_patches // self.patches_per_token
        self.tile_ids = {}  # (width, height) of an image -> ids of all its tiles

    def expand_image_tokens(self, ids, image):
        if image is None:
            return ids
        place = ids.index(self.image_token)
        return ids[:place] + self._tile_ids(image) + ids[place + 1:]

    def _tile_ids(self, image):
        if image.size not in self.tile_ids:
            pixels = self.image_processor([[image]], return_row_col_info=True)
            text = self._tile_text(pixels["rows"][0][0], pixels["cols"][0][0])
            self.tile_ids[image.size] = self.tokenizer.encode(text, add_special_tokens=False)
        return self.tile_ids[image.size]

    def _tile_text(self, rows, columns):
        """As the library's processor writes it, which needs packages for video; no rows: not cut.

        What names a tile is a token in SmolVLM2, and spelt out in the first SmolVLM."""
        tile = self.tokenizer.convert_ids_to_tokens(self.image_token) * self.tile_tokens
        text = ""
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                text += f"{AROUND}<row_{row}_col_{column}>{tile}"
            text += "\n"
        if rows:
            text += "\n"
        return f"{text}{AROUND}<global-img>{tile}{AROUND}"

    def image_patches(self, image):
        return self._tile_ids(image).count(self.image_token) * self.patches_per_token

    tower_patches = image_patches

    def encode_images(self, images):
        """Per image (embeddings (tokens, C),), its tiles one after the other."""
        pixels = self.image_processor([[image] for image in images], return_tensors="pt")
        values = pixels["pixel_values"]  # (B, most tiles, 3, height, width)
        used = pixels["pixel_attention_mask"].flatten(2).sum(2).count_nonzero(1).tolist()
        tiles = torch.cat([image[:count] for image, count in zip(values, used)])
        tiles = tiles.to(self.model.device, self.model.vision_model.dtype)
        side = self.model.vision_model.embeddings.num_patches_per_side
        whole = torch.ones(len(tiles), side, side, dtype=torch.bool, device=tiles.device)
        tower = self.model.vision_model(pixel_values=tiles, patch_attention_mask=whole)
        embeddings = self.model.connector(tower.last_hidden_state)  # (all tiles, tokens, C)
        return [(image.flatten(0, 1).to(self.dtype),) for image in embeddings.split(used)]

    def count_patches(self, features):
        return len(features[0]) * self.patches_per_token

    def text_inputs(self, ids, mask, features):
        """TextInputs of prompts (B, T): image embeddings in the places of the image tokens."""
        embedded = with_images(self, ids, [embeddings for embeddings, in features])
        prompt = {"inputs_embeds": embedded, "position_ids": positions(mask)}
        return TextInputs(prompt, {}, torch.zeros_like(ids[:, :1]))


NO_PICTURES = ("model.path: this model reads text alone; for a task with pictures name a "
               "vision-language model, or take the task in words (env.image_size=null)")


class TextOnly:
    """Any language model of AutoModelForCausalLM: Llama, Qwen3, SmolLM2 (a Llama), Gemma.

    The whole model is the part `language`. No image can reach it: Raises UserError.
    """
    parts = {"language": ""}
    parts_in_float32 = ()
    special_tokens = []
    image_token = -1  # no token has this id

    def __init__(self, base, image_processor, tokenizer):
        self.base = base
        # base_model would do, but for Gemma 3 in transformers 4
        self.text_model = getattr(base, "model", base.base_model)

    def expand_image_tokens(self, ids, image):
        if image is not None:
            raise UserError(NO_PICTURES)
        return ids

    def image_patches(self, image):
        raise UserError(NO_PICTURES)

    tower_patches = image_patches

    @torch.no_grad()
    def check_logits(self):
        """The policy reads logits off lm_head; some models scale or cap them afterwards.

        Raises: UserError for such a model.
        """
        ids = torch.arange(1, 9, device=self.base.device)[None]  # (1, T)
        hidden = self.text_model(input_ids=ids).last_hidden_state  # (1, T, C)
        head = getattr(self.base, "lm_head", None)
        wanted = self.base(input_ids=ids).logits  # (1, T, V)
        if head is None or not torch.allclose(head(hidden), wanted, rtol=0.01, atol=0.01):
            raise UserError(f"model.path: the logits of a {self.base.config.model_type} are more "
                            "than its lm_head's (capped or scaled): not supported")


FAMILIES = {"mllama": CrossAttention, "qwen2_vl": Inline, "qwen2_5_vl": Inline, "qwen3_vl": Inline,
            "idefics3": Tiled, "smolvlm": Tiled}  # by model_type


def family_of(config):
    """The family's class for a model's configuration. Raises: UserError."""
    kind = config.model_type
    if kind in FAMILIES:
        return FAMILIES[kind]
    sees = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not sees:
        return TextOnly
    raise UserError(f"model.path: {kind} is none of the known families, {', '.join(FAMILIES)} "
                    "(lib/families.py), and no language model without images")


def auto_class(config):
    """transformers' Auto class that loads a model of this configuration. Raises: UserError."""
    if family_of(config) is TextOnly:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def _layers(config, patterns):
    """Names of the linear layers that patterns match: transformers 4 takes no pattern and would
    quantise them, saying nothing."""
    with init_empty_weights():
        base = auto_class(config).from_config(config)
    names = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)]
    return [name for name in names
            if any(re.match(pattern, name) or name.endswith(pattern) for pattern in patterns)]


def quantization(model, config):
    """transformers' settings of 4-bit NF4 with double quantisation, or None.

    Args: model: cfg.model; config: the base's transformers configuration.
    """
    if model.quantization == "none":
        return None
    parts = family_of(config).parts
    kept = [parts.get(name, name) for name in model.keep_unquantized]
    if VERSION_4:
        kept = _layers(config, kept)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                              bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=getattr(torch, model.dtype),
                              llm_int8_skip_modules=kept)
