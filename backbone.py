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
import os
import re

import torch
from accelerate import init_empty_weights
from bitsandbytes.nn import Params4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch.nn.functional import pad
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from config import ROOT, UserError, find_model, out_of_memory

GATE = 0.5  # of random cross-attention layers, which would ignore the image at the usual 0


# ---------------------------------------------------------------- families
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


# ---------------------------------------------------------------- loading
def load(model, device):
    """Tokenizer, image processor, base model and family of cfg.model, through the Auto classes.

    Raises: UserError for a model that is missing, gated, damaged or of an unknown family.
    """
    for key in ("shape", "tokenizer") if model.random_init else ("path",):
        path = getattr(model, key)
        local = key != "path" or path.startswith(("/", ".", "~")) or (ROOT / path).parent.is_dir()
        if local and not os.path.isdir(find_model(path)):
            raise UserError(f"model.{key}: no folder {path!r}"
                            + "; give a local folder or a hub name like organisation/model" * (key == "path"))
    try:
        shape = find_model(model.shape if model.random_init else model.path)
        config = AutoConfig.from_pretrained(shape)
        kind = family(config)
        tokenizer = AutoTokenizer.from_pretrained(find_model(model.tokenizer) if model.random_init else shape)
        if tokenizer.chat_template is None:
            raise UserError(f"model.path: the tokenizer of {model.path!r} has no chat template; name an Instruct model")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        image_processor = AutoImageProcessor.from_pretrained(shape, backend="pil")  # the same pixels everywhere
        base, found = (random_base(model, config, device), {}) if model.random_init else \
            AutoModelForImageTextToText.from_pretrained(shape, dtype=getattr(torch, model.dtype), device_map={"": device},
                                                        quantization_config=quantization(model, config),
                                                        attn_implementation="sdpa", output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        raise UserError(_unavailable(model.path, error)) from None
    if lost := sorted(found.get("missing_keys", ())):  # they would be random
        raise UserError(f"model.path: the weights of {model.path!r} lack {len(lost)} tensors, such as {lost[0]}")
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack the weights for AVX512 at the first eval forward and then pass no gradient back
            module.support_avx512bf16_for_cpu = False
    if model.random_init:
        base.config.image_token_index = base.config.image_token_id = tokenizer.convert_tokens_to_ids("<|image|>")
    return tokenizer, image_processor, base, kind(base, image_processor)


def _unavailable(path, error):
    """Why a model cannot be had and what to do, in one line."""
    if os.path.isdir(find_model(path)) or isinstance(error, (RuntimeError, SafetensorError)):  # it was there
        return f"model.path: cannot load {path!r}: {one_line(error)}"
    gated = "gated" in str(error) or "401" in str(error) or "403" in str(error)
    return (f"model.path: cannot load {path!r}: " + ("its licence is not accepted with this login" if gated else
            f"no such folder, and not on the hub, or the hub is out of reach ({one_line(error)})")
            + f"; accept the licence at https://huggingface.co/{path} and log in (hf auth login), or give a local folder. "
            "Llama 3.2 Vision grants no rights to individuals domiciled, or companies based, in the EU: name another model, "
            "such as model.path=Qwen/Qwen2.5-VL-7B-Instruct. model.random_init=true needs no weights")


def one_line(error):
    """An exception as one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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


def adapt(base, parts, tune, lora):
    """LoRA (fp32) on the layers of the tuned parts that cfg.lora names; without it the tuned parts learn themselves.

    Returns: the peft model, or the base itself; what learns requires a gradient. Raises: UserError.
    """
    tuned = "|".join(parts[part] for part in tune)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(lora is None and bool(re.match(tuned, name)))
    if lora is None:
        return base
    try:
        net = get_peft_model(base, LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0,
                                              target_modules=f"(?={tuned})({lora.target_modules})"))
    except (ValueError, re.error) as error:
        raise UserError(f"lora.target_modules: {one_line(error)}") from None
    for name, layer in net.named_modules():
        if isinstance(layer, LoraLayer) and not isinstance(layer.get_base_layer(), torch.nn.Linear):
            raise UserError(f"lora.target_modules: {name} is no linear layer")
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return net


# ---------------------------------------------------------------- random weights
def skeleton(model, config):
    """The base as `load` makes it, its parameters without storage (on the meta device), unquantised dtype and shape."""
    settings = quantization(model, config)
    with init_empty_weights():  # buffers, such as rotary frequencies, are real
        base = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, model.dtype), attn_implementation="sdpa")
    if settings is not None:
        replace_with_bnb_linear(base, settings.llm_int8_skip_modules, settings)
        base.is_loaded_in_4bit = True  # as peft wants to know
    return base.eval()


@torch.no_grad()
def random_base(model, config, device):
    """A base of exactly this shape with random weights. Each layer is quantised as soon as it is drawn: the 16-bit model
    never exists."""
    base = skeleton(model, config)
    for module in base.modules():
        for name, empty in module.named_parameters(recurse=False):
            value = torch.empty(empty.shape, dtype=base.dtype, device=device)
            if "gate" in name:
                value.fill_(GATE)
            elif value.dim() == 1:
                value.fill_(float(name == "weight"))  # norms and biases
            else:
                value.normal_(0, config.get_text_config().initializer_range)
            if isinstance(empty, Params4bit):
                value = Params4bit(value, requires_grad=False, quant_type=empty.quant_type, module=module,
                                   compress_statistics=empty.compress_statistics).to(device)  # quantised on the way
            else:
                value = torch.nn.Parameter(value, requires_grad=False)
            module._parameters[name] = value
    base.tie_weights()
    return base.to(device)  # the buffers


def spellable(tokenizer):
    """Token ids of one printable character each that never merge: a text of them has exactly these tokens again."""
    ids = [i for i in range(len(tokenizer)) if len(t := tokenizer.decode([i])) == 1 and t.isalnum() and t.isascii()]
    same = lambda *ids: tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) == [*ids]  # noqa: E731
    kept = []
    for i in ids:
        if same(i) and all(same(i, k) and same(k, i) for k in [i, *kept]):
            kept.append(i)
    return kept
