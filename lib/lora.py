"""LoRA forwards that differ from peft's: merged for sampling, and in 16 bits."""
from functools import partial

from bitsandbytes.functional import dequantize_4bit
from torch.nn.functional import linear


def _merged(layer):
    """Forward of a LoRA layer as one matmul with W + s B A, where a 4-bit layer has a dequantisation and three: faster, but
    a dense copy of W."""
    base = layer.get_base_layer()
    state = getattr(base.weight, "quant_state", None)
    weight = base.weight.data if state is None else dequantize_4bit(base.weight.data, state)
    return partial(linear, weight=(weight + layer.get_delta_weight("default")).to(weight.dtype), bias=base.bias)


def _light(layer, dtype, fixed):
    """Forward of a LoRA layer as W x + (s B) (A x), all in the base's dtype and into one result, where peft's own computes
    A x and B in fp32 beside it. fixed: with the weights of now."""
    base, a, b, scale = layer.get_base_layer(), layer.lora_A["default"], layer.lora_B["default"], layer.scaling["default"]

    def weights():
        return a.weight.to(dtype), (scale * b.weight).to(dtype).T

    now = weights() if fixed else None

    def forward(x):
        down, up = now or weights()
        flat = x.reshape(-1, x.shape[-1])  # of more dimensions, a 4-bit layer with a bias would return a view
        return base(flat).addmm_(linear(flat, down), up).view(*x.shape[:-1], -1)
    return forward
