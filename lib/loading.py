"""The frozen base model, loaded through the Auto classes, in 4 bits if asked."""
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch
from bitsandbytes.nn import Linear4bit
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.utils import cached_file

from lib.errors import UserError, one_line, out_of_memory
from lib.families import (
    NO_PICTURES, VERSION_4, TextOnly, auto_class, family_of, quantization)
from lib.random_weights import random_base
from lib.settings import ROOT, find_model


class Loaded(NamedTuple):
    tokenizer: object
    image_processor: object  # None of a family without images
    base: torch.nn.Module
    family: object  # of lib/families.py


def load_base(model, device):
    """Tokenizer, image processor, base model and family of cfg.model.

    Raises: UserError for a model that is missing, gated, damaged or of an unknown family, and for a
        card that does not compute in model.dtype.
    """
    _check_folders(model)
    _check_dtype(model, device)
    try:
        loaded = _load_random(model, device) if model.random_init else _load(model, device)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        raise UserError(_unavailable(model.path, error)) from None
    for module in loaded.base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack the weights for AVX512 at the first eval forward and then
            # pass no gradient back
            module.support_avx512bf16_for_cpu = False
    if model.dtype == "float16":
        _widen(loaded.base, loaded.family)
    if isinstance(loaded.family, TextOnly) and not model.random_init:
        loaded.family.check_logits()
    return loaded


def check_reads_images(model, observation):
    """Before anything is loaded but the model's config: can it read what the task shows?

    Args: model: cfg.model; observation: one of the environment's, which are all alike in this.
    Raises: UserError for a picture and a model that reads text alone, or a model that is missing.
    """
    if observation["image"] is None:
        return
    _check_folders(model)
    if reads_text_alone(model.shape if model.random_init else model.path):
        raise UserError(NO_PICTURES)


def reads_text_alone(path):
    """Whether the model of a folder or hub name takes no images, by its config.json. Raises:
    UserError."""
    try:
        config = AutoConfig.from_pretrained(find_model(path))
    except (OSError, ValueError) as error:
        raise UserError(_unavailable(path, error)) from None
    return family_of(config) is TextOnly


def _widen(base, family):
    """Give float32 to those parts of a float16 model whose numbers may exceed its 65504."""
    for name, module in base.named_modules():
        if not any(re.match(family.parts[part], name) for part in family.parts_in_float32):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():  # not those in 4 bits
                parameter.data = parameter.data.float()
        if isinstance(module, Linear4bit):
            module.compute_dtype = torch.float32


def _load(model, device):
    """A model with its weights, from a folder or the hub."""
    path = find_model(model.path)
    config = AutoConfig.from_pretrained(path)
    if VERSION_4:
        _check_positions(config.get_text_config(), model.path)
    family = _family(config, model.tune)
    tokenizer = _tokenizer(path, model.path)
    image_processor = load_image_processor(path, family)
    base, found = auto_class(config).from_pretrained(
        path, dtype=getattr(torch, model.dtype), device_map={"": device},
        quantization_config=quantization(model, config), attn_implementation="sdpa",
        output_loading_info=True)
    lost = sorted(found.get("missing_keys", ()))
    if lost:  # they would be random
        raise UserError(f"model.path: the weights of {model.path!r} lack {len(lost)} tensors, "
                        f"such as {lost[0]}")
    return Loaded(tokenizer, image_processor, base, family(base, image_processor, tokenizer))


def _check_positions(text, path):
    """Raises: UserError where transformers 4 would pass over the rotary positions that transformers
    5 wrote, and say nothing. text: configuration of the text model."""
    written = getattr(text, "rope_parameters", None) or {}
    by_layer = any(isinstance(value, dict) for value in written.values())
    scaled = written.get("rope_type", "default") != "default" and not text.rope_scaling
    if by_layer or scaled or written.get("rope_theta", text.rope_theta) != text.rope_theta:
        raise UserError(f"model.path: the config.json of {path!r} was written by transformers 5, "
                        "and this version 4 would read other positions: pip install -r "
                        "requirements.txt")


def _load_random(model, device):
    """Random weights in the shape of model.shape, with the tokenizer of model.tokenizer."""
    shape = find_model(model.shape)
    config = AutoConfig.from_pretrained(shape)
    family = _family(config, model.tune)
    tokenizer = _tokenizer(find_model(model.tokenizer), model.tokenizer)
    tokenizer.add_tokens(family.special_tokens, special_tokens=True)
    image_processor = load_image_processor(shape, family)
    base = random_base(model, config, device)
    if family is not TextOnly:
        image_token = tokenizer.convert_tokens_to_ids("<|image|>")
        base.config.image_token_index = base.config.image_token_id = image_token
    return Loaded(tokenizer, image_processor, base, family(base, image_processor, tokenizer))


def _family(config, tune):
    """The family's class. Raises: UserError if it is unknown or lacks a part of model.tune."""
    family = family_of(config)
    for part in tune:
        if part not in family.parts:
            raise UserError(f"model.tune: a {config.model_type} has no {part}, it reads text "
                            "alone: model.tune=[language]")
    return family


def load_image_processor(path, family):
    """By PIL, not torchvision: no further dependency, and the same pixels everywhere. None for a
    family without images.

    Raises: UserError for one that needs torchvision.
    """
    if family is TextOnly:
        return None
    by_pil = {"use_fast": False} if VERSION_4 else {"backend": "pil"}
    try:
        return AutoImageProcessor.from_pretrained(path, **by_pil)
    except (ImportError, ValueError) as error:
        if "torchvision" not in str(error).lower():
            raise
        raise UserError(f"model.path: the image processor of {path!r} needs torchvision, which is "
                        "not used here: name a model whose images PIL can prepare") from None


def _tokenizer(path, name):
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _processor_template(path)
    if tokenizer.chat_template is None:
        raise UserError(f"model.path: the tokenizer of {name!r} has no chat template; "
                        "name an Instruct model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _processor_template(path):
    """The chat template in chat_template.json, where older models of several kinds of input keep
    theirs, or None."""
    file = cached_file(path, "chat_template.json", _raise_exceptions_for_missing_entries=False)
    if file is None:
        return None
    return json.loads(Path(file).read_text(encoding="utf-8"))["chat_template"]


def _check_folders(model):
    """Raises: UserError if a path that can only be a local folder is not there."""
    if model.random_init:
        for key in ("shape", "tokenizer"):
            if not os.path.isdir(find_model(getattr(model, key))):
                raise UserError(f"model.{key}: no folder {getattr(model, key)!r}")
        return
    path = model.path
    local = path.startswith(("/", ".", "~")) or (ROOT / path).parent.is_dir()
    if local and not os.path.isdir(find_model(path)):
        raise UserError(f"model.path: no folder {path!r}; give a local folder or a hub name like "
                        "organisation/model")


def _check_dtype(model, device):
    """Raises: UserError if the card lacks these 16 bits, which PyTorch would emulate, slowly, or if
    the CPU does not compute in them."""
    if model.dtype == "float32":
        return
    if device.type == "cpu":
        _try_on_cpu(model.dtype)
    if device.type != "cuda":
        return
    has_float16 = torch.cuda.get_device_capability(device) >= (5, 3)
    has = {"float16": has_float16,
           "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False)}
    if not has[model.dtype]:
        other = "float16" if has_float16 else "float32"
        raise UserError(f"model.dtype={model.dtype}, but {torch.cuda.get_device_name(device)} does "
                        f"not compute in it; use model.dtype={other} (python plan.py CONFIG "
                        f"model.dtype={other} shows whether it fits)")


def _try_on_cpu(dtype):
    """Raises: UserError if PyTorch has no such matrix product here."""
    ones = torch.ones(2, 2, dtype=getattr(torch, dtype))
    try:
        torch.nn.functional.linear(ones, ones).softmax(-1)
    except RuntimeError as error:
        raise UserError(f"model.dtype={dtype}, but PyTorch does not compute in it on this CPU "
                        f"({one_line(error)}); use model.dtype=float32") from None


def _unavailable(path, error):
    """Why a model cannot be had and what to do, in one line."""
    was_there = isinstance(error, (RuntimeError, SafetensorError))
    if os.path.isdir(find_model(path)) or was_there:
        return f"model.path: cannot load {path!r}: {one_line(error)}"
    gated = any(word in str(error) for word in ("gated", "401", "403"))
    llama = "llama-3.2" in path.lower()
    reason = ("its licence is not accepted with this login" if gated else
              "no such folder, and not on the hub, or the hub is out of reach "
              f"({one_line(error)})")
    line = f"model.path: cannot load {path!r}: {reason}; "
    if gated or llama:
        line += (f"accept the licence at https://huggingface.co/{path} and log in "
                 "(hf auth login), or ")
    line += "give a local folder. "
    if llama:
        line += ("Llama 3.2 Vision grants no rights to individuals domiciled, or companies based, "
                 "in the EU: name another model, such as model.path=Qwen/Qwen2.5-VL-7B-Instruct. ")
    return line + "model.random_init=true needs no weights"
