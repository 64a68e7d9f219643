"""The output layer of a 16-bit model, computed in float32.

Logits of 16 bits are 0.125 apart between 16 and 32 (bfloat16), which T = 0.2 makes 0.6 nats: more
than one step of PPO moves a whole answer. Hidden states and weights stay as they are; their product
is not rounded.
"""
import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora import LoraLayer

WEIGHTS_AT_ONCE = 2**26  # of the output layer, in float32 at the same time: 256 MiB


def logits_in_float32(head, hidden):
    """Logits (..., V) in fp32 from hidden states (..., C) in 16 bits.

    Args: head: the output layer, a linear one, in 4 bits or with LoRA too.
    """
    layer = head.get_base_layer() if isinstance(head, LoraLayer) else head
    with torch.autocast(hidden.device.type, enabled=False):
        states = hidden.float()
        logits = Float32Product.apply(states, dense(layer))
        if layer.bias is not None:
            logits = logits + layer.bias.float()
        if isinstance(head, LoraLayer):
            inner = head.lora_A["default"](states)
            logits = logits + head.scaling["default"] * head.lora_B["default"](inner)
    return logits


def dense(layer):
    """The weight (V, C) of a linear layer, dequantised if it is in 4 bits."""
    state = getattr(layer.weight, "quant_state", None)
    return layer.weight.data if state is None else dequantize_4bit(layer.weight.data, state)


class Float32Product(torch.autograd.Function):
    """states @ weight.T with a frozen 16-bit weight, of which a few rows at a time are float32."""

    @staticmethod
    def forward(context, states, weight):
        context.weight = weight
        logits = states.new_empty(*states.shape[:-1], len(weight))  # (..., V)
        for rows in _parts(weight):
            logits[..., rows] = states @ weight[rows].float().T
        return logits

    @staticmethod
    def backward(context, gradient):
        weight = context.weight
        gradient = gradient.float()
        total = gradient.new_zeros(*gradient.shape[:-1], weight.shape[1])  # (..., C)
        for rows in _parts(weight):
            total += gradient[..., rows] @ weight[rows].float()
        return total, None


def _parts(weight):
    """Slices of the rows of a weight (V, C)."""
    size = max(1, WEIGHTS_AT_ONCE // weight.shape[1])
    return [slice(start, start + size) for start in range(0, len(weight), size)]
