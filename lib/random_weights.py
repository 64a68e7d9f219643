"""Dry runs: a base of the exact shape with random weights, so that memory and speed can be tried without a download."""
import torch
from accelerate import init_empty_weights
from bitsandbytes.nn import Params4bit
from transformers import AutoModelForImageTextToText
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from lib.families import quantization

GATE = 0.5  # of random cross-attention layers, which would ignore the image at the usual 0


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
