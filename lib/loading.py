"""The frozen base model, loaded through the Auto classes, in 4 bits if asked, and LoRA on it."""
import os
import re

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from lib.families import family, quantization
from lib.random_weights import random_base
from lib.settings import ROOT, UserError, find_model, one_line, out_of_memory


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
