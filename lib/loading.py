"""The frozen base model, loaded through the Auto classes, in 4 bits if asked."""
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from transformers.utils import cached_file

from lib.families import family_of, quantization
from lib.random_weights import random_base
from lib.settings import ROOT, UserError, find_model, one_line, out_of_memory


class Loaded(NamedTuple):
    tokenizer: object
    image_processor: object
    base: torch.nn.Module
    family: object  # of lib/families.py


def load_base(model, device):
    """Tokenizer, image processor, base model and family of cfg.model.

    Raises: UserError for a model that is missing, gated, damaged or of an unknown family, and for a
        card without bfloat16.
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
    return loaded


def _load(model, device):
    """A model with its weights, from a folder or the hub."""
    path = find_model(model.path)
    config = AutoConfig.from_pretrained(path)
    family = family_of(config)
    tokenizer = _tokenizer(path, model.path)
    image_processor = load_image_processor(path)
    base, found = AutoModelForImageTextToText.from_pretrained(
        path, dtype=getattr(torch, model.dtype), device_map={"": device},
        quantization_config=quantization(model, config), attn_implementation="sdpa",
        output_loading_info=True)
    lost = sorted(found.get("missing_keys", ()))
    if lost:  # they would be random
        raise UserError(f"model.path: the weights of {model.path!r} lack {len(lost)} tensors, "
                        f"such as {lost[0]}")
    return Loaded(tokenizer, image_processor, base, family(base, image_processor, tokenizer))


def _load_random(model, device):
    """Random weights in the shape of model.shape, with the tokenizer of model.tokenizer."""
    shape = find_model(model.shape)
    config = AutoConfig.from_pretrained(shape)
    family = family_of(config)
    tokenizer = _tokenizer(find_model(model.tokenizer), model.tokenizer)
    tokenizer.add_tokens(getattr(family, "special_tokens", []), special_tokens=True)
    image_processor = load_image_processor(shape)
    base = random_base(model, config, device)
    image_token = tokenizer.convert_tokens_to_ids("<|image|>")
    base.config.image_token_index = base.config.image_token_id = image_token
    return Loaded(tokenizer, image_processor, base, family(base, image_processor, tokenizer))


def load_image_processor(path):
    """By PIL, not torchvision: no further dependency, and the same pixels everywhere.

    Raises: UserError for one that needs torchvision.
    """
    try:
        return AutoImageProcessor.from_pretrained(path, backend="pil")
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
    """Raises: UserError if the card lacks bfloat16, which PyTorch would emulate, slowly."""
    if device.type != "cuda" or model.dtype != "bfloat16":
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"model.dtype=bfloat16, but {torch.cuda.get_device_name(device)} does not "
                        "compute in it; use model.dtype=float32 (python plan.py CONFIG "
                        "model.dtype=float32 shows whether it fits)")


def _unavailable(path, error):
    """Why a model cannot be had and what to do, in one line."""
    was_there = isinstance(error, (RuntimeError, SafetensorError))
    if os.path.isdir(find_model(path)) or was_there:
        return f"model.path: cannot load {path!r}: {one_line(error)}"
    if any(word in str(error) for word in ("gated", "401", "403")):
        reason = "its licence is not accepted with this login"
    else:
        reason = ("no such folder, and not on the hub, or the hub is out of reach "
                  f"({one_line(error)})")
    return (f"model.path: cannot load {path!r}: {reason}; accept the licence at "
            f"https://huggingface.co/{path} and log in (hf auth login), or give a local folder. "
            "Llama 3.2 Vision grants no rights to individuals domiciled, or companies based, in "
            "the EU: name another model, such as model.path=Qwen/Qwen2.5-VL-7B-Instruct. "
            "model.random_init=true needs no weights")
