"""LoRA on the frozen base: which layers get it, and layers as one matmul with a dense weight."""
import re
from contextlib import contextmanager
from functools import partial

import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.nn.functional import linear

from lib.errors import UserError, one_line


def add_lora(base, parts, tune, lora):
    """LoRA (fp32) on the linear layers of the tuned parts; without it those parts learn themselves.

    Args:
        base: the model; parts: {part: pattern of parameter names} of its family.
        tune: names of the parts that learn (cfg.model.tune).
        lora: cfg.lora (r, alpha, target_modules), or None: full tuning.
    Returns: the peft model, or the base itself; what learns requires a gradient.
    Raises: UserError if lora.target_modules is no pattern, or of no linear layer.
    """
    tuned = "|".join(parts[part] for part in tune)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(lora is None and bool(re.match(tuned, name)))
    if lora is None:
        return base
    try:
        config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0,
                            target_modules=f"(?={tuned})({lora.target_modules})")
        net = get_peft_model(base, config)
    except (ValueError, re.error) as error:
        raise UserError(f"lora.target_modules: {one_line(error)}") from None
    for name, layer in net.named_modules():
        if isinstance(layer, LoraLayer) and not isinstance(layer.get_base_layer(), torch.nn.Linear):
            raise UserError(f"lora.target_modules: {name} is no linear layer")
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for layer in lora_layers(net):
        # peft would cast a layer's input to the fp32 of A: off, so that under the autocast of a
        # 16-bit model A and B are cast to its dtype
        layer.cast_input_dtype_enabled = False
    return net


def lora_layers(net):
    """All LoRA layers of a peft model; none of a model that is tuned itself."""
    return [module for module in net.modules() if isinstance(module, LoraLayer)]


@contextmanager
def merged_weights(layers, learn=False):
    """Inside, each LoRA layer is one matmul with a dense copy of W + s B A, as it is on entering.

    Faster than a dequantisation and three matmuls at every pass, but it takes the memory of the
    copies. The 4-bit weights themselves are not touched: merging into them would round.

    Args: learn: the copies gather the gradient of all backward passes inside, which on leaving goes
        on to A and B; otherwise, and from later ones, these get none. For float32 alone: in 16 bits
        the sum rounds away what a step changes.
    Raises: RuntimeError inside another one.
    """
    if any("forward" in vars(layer) for layer in layers):
        raise RuntimeError("LoRA is merged already")
    with torch.set_grad_enabled(learn):
        merged = [dense_weight(layer) for layer in layers]
    copies = [weight.detach().requires_grad_(weight.requires_grad) for weight in merged]
    for layer, copy in zip(layers, copies):
        layer.forward = partial(linear, weight=copy, bias=layer.get_base_layer().bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # set on the layer it hid its class's
    learnt = [(weight, copy.grad) for weight, copy in zip(merged, copies) if copy.grad is not None]
    if learnt:
        torch.autograd.backward(*zip(*learnt))


def dense_weight(layer):
    """W + s B A of a LoRA layer in W's dtype, dequantised; gradients reach A and B."""
    weight = layer.get_base_layer().weight
    state = getattr(weight, "quant_state", None)
    dense = weight.data if state is None else dequantize_4bit(weight.data, state)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # (r, in), (out, r)
    delta = layer.scaling["default"] * (up @ down)
    return (dense + delta).to(dense.dtype)
