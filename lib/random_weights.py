"""Dry runs: a base of the exact shape with random weights, and prompts and answers brought to real
lengths, so that memory and speed can be tried without a download."""
import torch
from accelerate import init_empty_weights
from bitsandbytes.nn import Params4bit
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from lib.families import auto_class, quantization
from lib.prompts import PromptEncoder

GATE = 0.5  # of random cross-attention layers, which would ignore the image at the usual 0


def skeleton(model, config):
    """The base as it will be loaded, its parameters without storage (on the meta device).

    Args: model: cfg.model; config: the base's transformers configuration.
    Returns: the model; 4-bit layers have the shape and dtype that they have before quantisation.
    """
    settings = quantization(model, config)
    with init_empty_weights():  # buffers, such as rotary frequencies, are real
        base = auto_class(config).from_config(config, dtype=getattr(torch, model.dtype),
                                              attn_implementation="sdpa")
    _tie_head(base)
    if settings is not None:
        replace_with_bnb_linear(base, modules_to_not_convert=settings.llm_int8_skip_modules,
                                quantization_config=settings)
        base.is_loaded_in_4bit = True  # as peft wants to know
    return base.eval()


def _tie_head(base):
    """As tie_weights does, which would make a second weight within init_empty_weights."""
    if base._tied_weights_keys and base.config.tie_word_embeddings:
        base.lm_head._parameters["weight"] = base.get_input_embeddings().weight


@torch.no_grad()
def random_base(model, config, device):
    """A base of exactly this shape with random weights.

    Each layer is quantised as soon as it is drawn: the 16-bit model never exists.
    """
    base = skeleton(model, config)
    spread = config.get_text_config().initializer_range
    for module in base.modules():
        for name, empty in module.named_parameters(recurse=False):
            value = torch.empty(empty.shape, dtype=base.dtype, device=device)
            _fill(value, name, spread)
            module._parameters[name] = _as_parameter(value, empty, module)
    _tie_head(base)
    return base.to(device)  # the buffers


def _fill(value, name, spread):
    if "gate" in name:
        value.fill_(GATE)
    elif value.dim() == 1:  # norms and biases
        value.fill_(1.0 if name == "weight" else 0.0)
    else:
        value.normal_(0, spread)


def _as_parameter(value, empty, module):
    """The value as a parameter of the kind that `empty` is; a 4-bit one is quantised by `to`."""
    if not isinstance(empty, Params4bit):
        return torch.nn.Parameter(value, requires_grad=False)
    return Params4bit(value, requires_grad=False, quant_type=empty.quant_type, module=module,
                      compress_statistics=empty.compress_statistics).to(value.device)


# ---------------------------------------------------------------- prompts of real lengths
def spellable_tokens(tokenizer):
    """Ids of tokens of one letter or digit that never merge: a text of them has exactly these
    tokens again."""
    def reads_back(*ids):
        return tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) == list(ids)

    kept = []
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        if len(text) != 1 or not text.isalnum() or not text.isascii() or not reads_back(token):
            continue
        if all(reads_back(token, k) and reads_back(k, token) for k in [token, *kept]):
            kept.append(token)
    return kept


class FilledPromptEncoder(PromptEncoder):
    """Brings prompts and answers to the lengths that the YAML gives: the mini's tokenizer, and
    random weights, would make others.

    Args: as of PromptEncoder; lengths: cfg.model (prompt_tokens, answer_tokens, revision_tokens).
    """

    def __init__(self, tokenizer, family, lengths):
        super().__init__(tokenizer, family, lengths.thinking)
        self.lengths = lengths
        self.spellable = spellable_tokens(tokenizer)
        self.filler = self.spellable[0]

    def encode(self, observations):
        filled = [{**o, "messages": self._filled(o["messages"])} for o in observations]
        return super().encode(filled)

    def _filled(self, messages):
        """The user's messages filled up: the first to prompt_tokens, each revision by so many."""
        filled = []
        wanted = self.lengths.prompt_tokens
        for message in messages:
            filled.append(message)
            if message["role"] == "user":
                missing = wanted - len(self._ids([filled])[0])
                filled[-1] = self._with_text(message, self.decode([self.filler]) * missing)
                wanted += self.lengths.revision_tokens
        return filled

    def _with_text(self, message, text):
        content = message["content"]
        if isinstance(content, str):
            return {**message, "content": content + text}
        return {**message, "content": [*content, {"type": "text", "text": text}]}

    def encode_answers(self, texts):
        return [[self.filler] * self.lengths.answer_tokens for _ in texts]
