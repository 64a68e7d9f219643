"""Make a mini backbone: Llama-3.2-Vision's shape, under 2 M parameters, trained from scratch.

    python mini/pretrain.py mini/gp.yaml [key=value ...]      both stages: text, then vision
    python mini/pretrain.py mini/gp.yaml stages=[vision]      the second, on the text model there is
    python mini/pretrain.py mini/gp.yaml seed=1 out=runs/gp1  another backbone of the same recipe

The backbone stands in for pre-training: it has met the knowledge that the task asks for, in other
forms and under every rule (corpus_gp.py, corpus_virl.py), but never the task's answers, and nothing
of the `unseen` splits. What it knows and how well is in mini/README.md.
"""
import importlib
import json
import math
import sys
import time
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import (MllamaConfig, MllamaForConditionalGeneration, MllamaImageProcessor,
                          MllamaProcessor, PreTrainedTokenizerFast)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mini.documents import SPECIAL
torch.set_flush_denormal(True)  # gradients below 1e-38 count as 0: computing with them is slow
TEMPLATE = """{{ bos_token }}{% for message in messages %}\
{% if message['role'] == 'user' %}<|user|>{% else %}<|assistant|>{% endif %}\
{% if message['content'] is string %}{{ message['content'] }}\
{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}\
{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


# ---------------------------------------------------------------- the model
def build_processor(image_size, phrases):
    """Tokenizer (bytes, and whole phrases as one token), chat template and image processor."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    tokenizer.add_tokens([AddedToken(p, normalized=False, special=False) for p in phrases])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=TEMPLATE,
        bos_token=SPECIAL["bos"], eos_token=SPECIAL["eos"], pad_token=SPECIAL["pad"],
        additional_special_tokens=[SPECIAL["user"], SPECIAL["assistant"], SPECIAL["image"]])
    size = {"height": image_size, "width": image_size}
    images = MllamaImageProcessor(size=size, max_image_tiles=1)
    return MllamaProcessor(images, fast, chat_template=TEMPLATE)


def build_model(shape, tokenizer):
    """A MllamaForConditionalGeneration of the recipe's shape, cross-attention gates open (1)."""
    vocab_size = math.ceil(len(tokenizer) / 32) * 32
    text = dict(shape["text"], vocab_size=vocab_size, pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    image_token = tokenizer.convert_tokens_to_ids(SPECIAL["image"])
    config = MllamaConfig(text_config=text, vision_config=shape["vision"],
                          image_token_index=image_token)
    model = MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.endswith("_gate") and "vision" not in name:
            parameter.data.fill_(1.0)  # at 0, as initialised, the image would never be seen
    return model


# ---------------------------------------------------------------- documents
class Batch(NamedTuple):
    """Right-padded texts, (B, T) each; images and (B, slots) classes in the second stage alone."""
    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    pixels: dict
    probe: torch.Tensor


class Reading(NamedTuple):
    """A document as tokens."""
    ids: list
    labels: list  # the ids that carry loss, -100 for the others
    document: object


def batches(corpus, processor, train):
    """Endless Batches of about train["batch_tokens"] text tokens; like lengths together."""
    at_once, like = (256, 40) if corpus.image_size else (1024, 1)
    while True:
        documents = [corpus.document() for _ in range(at_once)]
        readings = [read(document, processor.tokenizer) for document in documents]
        if corpus.image_size:
            corpus.rng.shuffle(readings)
        readings.sort(key=lambda reading: len(reading.ids) // like)
        chunks = chunks_of(readings, train["batch_tokens"])
        corpus.rng.shuffle(chunks)
        for chunk in chunks:
            yield collate(chunk, processor)


def read(document, tokenizer):
    texts = [text for text, _ in document.parts]
    ids, labels = [], []
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for (_, learned), tokens in zip(document.parts, encoded):
        ids += tokens
        labels += tokens if learned else [-100] * len(tokens)
    return Reading(ids, labels, document)


def chunks_of(readings, tokens):
    """Successive Readings in lists whose padded size is at most `tokens`."""
    chunks, width = [[]], 0
    for reading in readings:
        width = max(width, len(reading.ids))
        if chunks[-1] and (len(chunks[-1]) + 1) * width > tokens:
            chunks.append([])
            width = len(reading.ids)
        chunks[-1].append(reading)
    return chunks[:-1]  # the last, which is seldom full, is left out


def collate(readings, processor):
    """A Batch of Readings."""
    width = max(len(reading.ids) for reading in readings)
    ids = torch.full((len(readings), width), processor.tokenizer.pad_token_id)
    labels = torch.full((len(readings), width), -100)
    for row, reading in enumerate(readings):
        ids[row, :len(reading.ids)] = torch.tensor(reading.ids)
        labels[row, :len(reading.ids)] = torch.tensor(reading.labels)
    mask = (ids != processor.tokenizer.pad_token_id).long()
    documents = [reading.document for reading in readings]
    if documents[0].image is None:
        return Batch(ids, mask, labels, None, None)
    images = [[document.image] for document in documents]
    pixels = processor.image_processor(images, return_tensors="pt")
    pixels.pop("num_tiles")
    probe = torch.tensor([document.probe for document in documents])
    return Batch(ids, mask, labels, pixels, probe)


# ---------------------------------------------------------------- training
def optimizers(model, train):
    """Muon for the matrices inside the blocks, AdamW for what else is trained."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim == 2 and "layers" in name:
            matrices.append(parameter)
        else:
            others.append(parameter)
    return [torch.optim.Muon(matrices, lr=train["lr_muon"], weight_decay=0.0),
            torch.optim.AdamW(others, lr=train["lr_adamw"], betas=(0.9, 0.95), weight_decay=0.0)]


def fit(model, opts, stream, loss_of, train):
    """Train until train["tokens"] text tokens are read. Returns: figures of the run."""
    groups = [group for optimizer in opts for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    seen, losses = 0, []
    start = time.time()
    bar = tqdm(total=train["tokens"], unit="tok", unit_scale=True)
    while seen < train["tokens"]:
        batch = next(stream)
        rest = 1 - seen / train["tokens"]  # learning rates: warm-up, constant, linear decay to 0
        factor = min(1.0, rest / train["decay"], 0.05 + seen / train["warmup_tokens"])
        for group, peak in zip(groups, peaks):
            group["lr"] = peak * factor
        loss = loss_of(batch)
        loss.backward()
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad()
        tokens = int(batch.mask.sum())
        seen += tokens
        losses.append(loss.item())
        bar.update(tokens)
        bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"tokens": seen, "steps": len(losses), "loss": mean(losses[-50:]),
            "seconds": time.time() - start, "parameters": parameters, "torch": torch.__version__}


def train_text(model, processor, recipe, game):
    """Stage 1: the language model learns what the game asks for, in words."""
    train = recipe["text"]
    corpus = game.Corpus(recipe["data"], recipe["seed"])

    def loss_of(batch):
        return model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss

    return fit(model, optimizers(model, train), batches(corpus, processor, train), loss_of, train)


def learns_to_see(name, recipe):
    """Whether the second stage trains the parameter: tower, projector, cross-attention layers."""
    parts = ["vision_model", "multi_modal_projector"]
    for layer in recipe["shape"]["text"]["cross_attention_layers"]:
        parts.append(f"language_model.layers.{layer}.")
    return any(part in name for part in parts)


def train_vision(model, processor, recipe, game):
    """Stage 2: tower, projector and cross-attention learn to see, as Llama 3.2's did.

    A linear probe is trained along (Probe in the corpus says of what): its loss tells the tower
    what matters long before the language loss would.
    """
    train = recipe["vision"]
    size = recipe["shape"]["vision"]["image_size"]
    side = size // recipe["shape"]["vision"]["patch_size"]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learns_to_see(name, recipe))
    corpus = game.Corpus({**recipe["data"], **train}, recipe["seed"], [size, size])
    probe = game.Probe(recipe["shape"]["text"]["hidden_size"], side)
    opts = optimizers(model, train)
    opts[1].add_param_group({"params": list(probe.parameters())})

    def loss_of(batch):
        after_image = (batch.ids == model.config.image_token_index).cumsum(1)  # (B, T)
        hidden = model.model.vision_model(**batch.pixels).last_hidden_state  # (B, 1, 1, P, C)
        states = model.model.multi_modal_projector(hidden).flatten(0, 2)  # (B, P, C)
        loss = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels,
                     cross_attention_states=states,
                     cross_attention_mask=after_image[:, :, None, None]).loss  # (B, T, 1, 1)
        patches = states[:, 1:].unflatten(1, (side, side))  # (B, side, side, C), P = 1 + side^2
        logits = probe(patches)  # (B, slots, classes)
        probe_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.probe.flatten())
        return loss + train["probe"] * probe_loss

    return fit(model, opts, batches(corpus, processor, train), loss_of, train)


def continue_from(folder, model, recipe):
    """Give the model the text stage's weights, beside fresh ones in what learns to see."""
    text = MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict()
    weights = model.to(torch.bfloat16).float().state_dict()
    for name in weights:
        if not learns_to_see(name, recipe):
            weights[name] = text[name]
    model.load_state_dict(weights)


def save(model, processor, out):
    """A model folder whose files transformers 4.57 reads as well, for `eval.save_merged`."""
    model.to(torch.bfloat16).save_pretrained(out)
    processor.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"]["rope_theta"] = rope.pop("rope_theta")
    config["text_config"]["rope_scaling"] = rope
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    del tokenizer["backend"]
    for name, settings in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        text = json.dumps(settings, indent=2, sort_keys=True)
        (out / name).write_text(text + "\n")


def change(recipe, keys, value):
    """Set a key of the recipe, or of a mapping within it.

    Raises: KeyError for one that is not there.
    """
    *outer, key = keys
    for name in outer:
        recipe = recipe[name]
    if key not in recipe:
        raise KeyError(".".join(keys))
    recipe[key] = value


def main(path, *overrides):
    """Train a backbone by a recipe. overrides: texts key=value."""
    recipe = yaml.safe_load(Path(path).read_text())
    for override in overrides:
        key, value = override.split("=", 1)
        change(recipe, key.split("."), yaml.safe_load(value))
    out = Path(recipe["out"])
    game = importlib.import_module(f"mini.corpus_{recipe['env']}")
    processor = build_processor(recipe["shape"]["vision"]["image_size"], game.phrases())
    for stage in recipe["stages"]:
        torch.manual_seed(recipe["seed"])
        model = build_model(recipe["shape"], processor.tokenizer)
        if stage == "text":
            figures = {"text": train_text(model, processor, recipe, game)}
        else:
            figures = json.loads((out / "training.json").read_text())
            continue_from(out, model, recipe)
            figures["vision"] = train_vision(model, processor, recipe, game)
        save(model, processor, out)
        (out / "training.json").write_text(json.dumps(figures, indent=1) + "\n")
        print(figures[stage])


if __name__ == "__main__":
    main(*sys.argv[1:])
