"""Weights of a policy on disk: adapters in peft's own format, value head, library versions."""
import hashlib
import re
import shutil
from pathlib import Path

import bitsandbytes
import peft
import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lib.errors import UserError, one_line
from lib.families import auto_class


def save_weights(policy, folder):
    """The adapter (or the whole model without LoRA), the value head and the library versions."""
    if policy.has_lora:
        policy.net.save_pretrained(folder, save_embedding_layers=False)  # "auto" would ask the hub
    else:
        _save_model(policy, policy.base, folder)
    save_file(policy.value_head.state_dict(), folder / "value_head.safetensors")
    libraries = (torch, transformers, peft, bitsandbytes)
    lines = [f"{library.__name__}=={library.__version__}" for library in libraries]
    lines.append(f"base=={_digest(policy)}")
    (folder / "versions.txt").write_text("\n".join(lines) + "\n")


def save_merged(policy, folder):
    """A normal model folder with W + s B A in place of W. Of an unquantised policy, whose LoRA is
    gone then."""
    _save_model(policy, policy.net.merge_and_unload() if policy.has_lora else policy.base, folder)


def _save_model(policy, model, folder):
    """All but the weights is copied from the base's folder: whichever version of transformers reads
    that reads this, too, which is not so of what a newer version writes itself."""
    model.save_pretrained(folder)
    if policy.tokenizer.name_or_path != model.name_or_path:  # random weights: two folders
        policy.tokenizer.save_pretrained(folder)
        if policy.image_processor is not None:
            policy.image_processor.save_pretrained(folder)
        return
    for file in model_folder(model.name_or_path).iterdir():
        lists_weights = file.name.endswith(".index.json")
        if file.suffix in (".json", ".jinja", ".model", ".txt") and not lists_weights:
            shutil.copyfile(file, folder / file.name)
    config = folder / "config.json"
    dtype = str(model.dtype).removeprefix("torch.")
    text = config.read_text(encoding="utf-8")  # may hold a dtype per part
    text = re.sub(r'("(torch_)?dtype": )"\w+"', rf'\1"{dtype}"', text)
    config.write_text(text, encoding="utf-8")


def model_folder(name):
    """The files of a model: its local folder, or the hub's as far as it has been downloaded, else
    None."""
    if Path(name).is_dir():
        return Path(name)
    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def load_weights(policy, folder, value_head=True):
    """Take over the weights of a checkpoint of the same shape.

    Raises: UserError naming what is wrong with it.
    """
    try:
        weights = _read_weights(policy, folder)
        head = load_file(folder / "value_head.safetensors", device=str(policy.device))
        versions = (folder / "versions.txt").read_text()
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"checkpoint {folder} is missing or damaged: {one_line(error)}") from None
    base = re.search("base==(.*)", versions)
    if base and base[1] != _digest(policy):
        raise UserError(f"checkpoint {folder} was trained on another base than the one in "
                        "model.path")
    own = {name.replace(".default.", "."): p for name, p in policy.trainable.items()}
    if {n: w.shape for n, w in weights.items()} != {n: p.shape for n, p in own.items()}:
        kind = "LoRA" if policy.has_lora else "model"
        raise UserError(f"checkpoint {folder} has other {kind} shapes than this configuration "
                        "(lora.r, lora.target_modules, model.tune)")
    for name, parameter in own.items():
        parameter.data.copy_(weights[name])
    if value_head:
        _load_value_head(policy, head, folder)


def _read_weights(policy, folder):
    """{name: tensor} of what is trained."""
    if policy.has_lora:
        return load_file(folder / "adapter_model.safetensors", device=str(policy.device))
    # the Auto classes know how names on disk map to the model's
    tuned = auto_class(policy.base.config).from_pretrained(folder, dtype=policy.base.dtype)
    return {name: p.data for name, p in tuned.named_parameters() if name in policy.trainable}


def _load_value_head(policy, head, folder):
    try:
        policy.value_head.load_state_dict(head)
    except RuntimeError:
        raise UserError(f"checkpoint {folder} has another value head than "
                        "ppo.value_hidden") from None


def _digest(policy):
    """Of the norms and biases of a base under LoRA, by which a checkpoint knows its own again
    wherever it lies."""
    if not policy.has_lora:
        return "none: the checkpoint is the whole model"
    frozen = [p for p in policy.base.parameters() if p.dim() == 1 and not p.requires_grad]
    bits = torch.cat(frozen).to("cpu", torch.bfloat16).view(torch.int16)
    return hashlib.sha256(bits.numpy()).hexdigest()[:16]
