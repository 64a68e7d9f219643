"""Make the mini backbone: a Llama-3.2-Vision-shaped model of under 2 M parameters, trained from scratch on a laptop.

    python mini/pretrain.py mini/gp.yaml            both stages: text, then vision
    python mini/pretrain.py mini/gp.yaml vision     the second alone, on the text model that is there

The backbone stands in for pre-training: it has met every rule in general form, and conversations in which imperfect
authors try, are corrected, and often just say the same thing again (corpus_gp.py, corpus_virl.py). It never meets a value
multiset or a route of the `unseen` splits. What it knows and how well is in mini/README.md.
"""
import importlib
import json
import sys
import time
from pathlib import Path

import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import (MllamaConfig, MllamaForConditionalGeneration, MllamaImageProcessor, MllamaProcessor,
                          PreTrainedTokenizerFast)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
SPECIAL = {"bos": "<|begin_of_text|>", "user": "<|user|>", "assistant": "<|assistant|>", "eos": "<|end|>",
           "image": "<|image|>", "pad": "<|pad|>"}
TEMPLATE = """{{ bos_token }}{% for message in messages %}\
{% if message['role'] == 'user' %}<|user|>{% else %}<|assistant|>{% endif %}\
{% if message['content'] is string %}{{ message['content'] }}\
{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}\
{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


# ---------------------------------------------------------------- tokenizer: bytes, plus whole phrases as one token
def build_processor(image_size, phrases):
    """Byte-level tokenizer with phrase tokens, chat template and image processor, saved like any other model's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    tokenizer.add_tokens([AddedToken(p, normalized=False, special=False) for p in phrases])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SPECIAL["bos"], eos_token=SPECIAL["eos"],
                                   pad_token=SPECIAL["pad"], chat_template=TEMPLATE,
                                   additional_special_tokens=[SPECIAL[k] for k in ("user", "assistant", "image")])
    images = MllamaImageProcessor(size={"height": image_size, "width": image_size}, max_image_tiles=1)
    return MllamaProcessor(images, fast, chat_template=TEMPLATE)


def build_model(shape, tokenizer):
    """A MllamaForConditionalGeneration with the YAML's text and vision shape; cross-attention gates open (1)."""
    vocab = -(-len(tokenizer) // 32) * 32
    text = dict(shape["text"], vocab_size=vocab, pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    config = MllamaConfig(text_config=text, vision_config=shape["vision"],
                          image_token_index=tokenizer.convert_tokens_to_ids(SPECIAL["image"]))
    model = MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.endswith("_gate") and "vision" not in name:
            parameter.data.fill_(1.0)  # at 0, as initialised, the image would never be seen
    return model


# ---------------------------------------------------------------- documents
def batches(corpus, tokenizer, tokens, loss_after):
    """Endless (input_ids, attention_mask, labels) of about `tokens` tokens; documents of like length together."""
    while True:
        found = [corpus.document() for _ in range(2048)]
        texts = [SPECIAL["bos"] + d + SPECIAL["eos"] if isinstance(d, str) else render(d) for d in found]
        documents = tokenizer(texts, add_special_tokens=False)["input_ids"]
        documents.sort(key=len)
        chunks, chunk = [], []
        for ids in documents:
            if chunk and (len(chunk) + 1) * len(ids) > tokens:
                chunks.append(chunk)
                chunk = []
            chunk.append(ids)
        corpus.rng.shuffle(chunks)
        for chunk in chunks:
            yield collate(chunk, tokenizer, loss_after)


def render(messages):
    """The chat template without Jinja, 50 times faster; a test holds the two equal."""
    text = SPECIAL["bos"]
    for m in messages:
        user, content = m["role"] == "user", m["content"]
        if isinstance(content, list):
            content = "".join(part.get("text", SPECIAL["image"]) for part in content)
        text += (SPECIAL["user"] if user else SPECIAL["assistant"]) + content + ("" if user else SPECIAL["eos"])
    return text


def collate(documents, tokenizer, loss_after=SPECIAL["assistant"]):
    """Right-padded batch; what follows the first token `loss_after` carries loss (before it, much is mere chance)."""
    marker = tokenizer.convert_tokens_to_ids(loss_after)
    width = max(map(len, documents))
    ids = torch.full((len(documents), width), tokenizer.pad_token_id)
    labels = torch.full((len(documents), width), -100)
    for row, document in enumerate(documents):
        start = document.index(marker) + 1 if marker in document else 1
        ids[row, :len(document)] = torch.tensor(document)
        labels[row, start:len(document)] = torch.tensor(document[start:])
    return ids, (ids != tokenizer.pad_token_id).long(), labels


# ---------------------------------------------------------------- training
def optimizers(model, train):
    """Muon for the matrices inside the blocks, AdamW for embeddings, output layer and vectors; trainable ones alone."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    body = [p for n, p in named if p.ndim == 2 and "layers" in n]
    ids = {id(p) for p in body}
    rest = [p for _, p in named if id(p) not in ids]
    return [torch.optim.Muon(body, lr=train["lr_muon"], weight_decay=0.0),
            torch.optim.AdamW(rest, lr=train["lr_adamw"], betas=(0.9, 0.95), weight_decay=0.0)]


def fit(model, opts, stream, step, train):
    """Train until train["tokens"] text tokens are read. step(batch) -> loss; batches start with (ids, mask).

    Returns: figures of the run.
    """
    base = [[g["lr"] for g in o.param_groups] for o in opts]
    seen, losses, start = 0, [], time.time()
    bar = tqdm(total=train["tokens"], unit="tok", unit_scale=True)
    while seen < train["tokens"]:
        batch = next(stream)
        share = seen / train["tokens"]
        factor = min(1.0, (1 - share) / train["decay"], 0.05 + seen / train["warmup_tokens"])
        for o, rates in zip(opts, base):
            for group, rate in zip(o.param_groups, rates):
                group["lr"] = rate * factor
        loss = step(batch)
        loss.backward()
        for o in opts:
            o.step()
            o.zero_grad()
        tokens = int(batch[1].sum())
        seen += tokens
        losses.append(loss.item())
        bar.update(tokens)
        if len(losses) % 20 == 0:
            bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}")
    return {"tokens": seen, "steps": len(losses), "loss": sum(losses[-50:]) / 50, "seconds": time.time() - start,
            "parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__}


def train_text(model, processor, recipe):
    """Stage 1: the language model learns the game in words."""
    train = recipe["train"]
    corpus = corpora(recipe).Corpus(recipe["data"], train["seed"])
    stream = batches(corpus, processor.tokenizer, train["batch_tokens"], train["loss_after"])

    def step(batch):
        ids, mask, labels = batch
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss

    return fit(model, optimizers(model, train), stream, step, train)


def learns_to_see(name, recipe):
    """Whether the second stage trains this parameter: tower, projector and cross-attention layers."""
    layers = [f"language_model.layers.{i}." for i in recipe["shape"]["text"]["cross_attention_layers"]]
    return any(part in name for part in ("vision_model", "multi_modal_projector", *layers))


def train_vision(model, processor, recipe):
    """Stage 2: tower, projector and cross-attention learn to see; the language model stays as it is, bit for bit.

    This is how Llama 3.2 got its eyes too. A linear probe is trained along (the corpus says what for): its loss tells the
    tower what matters long before the language loss would.
    """
    train, size = recipe["vision"], recipe["shape"]["vision"]["image_size"]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learns_to_see(name, recipe))
    corpus = corpora(recipe).Corpus({**recipe["data"], **train}, train["seed"], [size, size])
    side = size // recipe["shape"]["vision"]["patch_size"]
    probe = corpora(recipe).Probe(recipe["shape"]["text"]["hidden_size"], side)
    opts = optimizers(model, train)
    opts[1].add_param_group({"params": list(probe.parameters())})
    correct = []

    def step(batch):
        ids, mask, labels, pixels, targets = batch  # targets (B, slots)
        sight = (ids == model.config.image_token_index).cumsum(1)[:, :, None, None]
        hidden = model.model.vision_model(**pixels).last_hidden_state  # (B, 1, 1, 1 + side^2, C)
        states = model.model.multi_modal_projector(hidden).flatten(0, 2)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, cross_attention_states=states,
                     cross_attention_mask=sight).loss
        guess = probe(states[:, 1:].unflatten(1, (side, side)))  # (B, slots, classes)
        correct.append((guess.argmax(-1) == targets).float().mean().item())
        return loss + train["probe"] * torch.nn.functional.cross_entropy(guess.flatten(0, 1), targets.flatten())

    figures = fit(model, opts, pictures(corpus, processor, train["batch_tokens"]), step, train)
    return {**figures, "probe": sum(correct[-50:]) / 50}


def pictures(corpus, processor, tokens):
    """Endless batches about pictures: (input_ids, attention_mask, labels, pixel inputs, (B, slots) probe targets)."""
    while True:
        found = [corpus.conversation() for _ in range(256)]
        texts = [render(o["messages"]) for o in found]
        documents = list(zip(processor.tokenizer(texts, add_special_tokens=False)["input_ids"], found))
        corpus.rng.shuffle(documents)
        documents.sort(key=lambda d: len(d[0]) // 40)
        chunks, chunk = [], []
        for document in documents:
            if chunk and (len(chunk) + 1) * max(len(d[0]) for d in [*chunk, document]) > tokens:
                chunks.append(chunk)
                chunk = []
            chunk.append(document)
        corpus.rng.shuffle(chunks)
        for chunk in chunks:
            pixels = processor.image_processor([[o["image"]] for _, o in chunk], return_tensors="pt")
            targets = torch.tensor([o["probe"] for _, o in chunk])
            yield (*collate([ids for ids, _ in chunk], processor.tokenizer),
                   {k: pixels[k] for k in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}, targets)


def corpora(recipe):
    """The module with the phrases and the Corpus of the recipe's environment."""
    return importlib.import_module(f"corpus_{recipe['env']}")


STAGES = {"text": ("train", train_text), "vision": ("vision", train_vision)}  # name -> section of the recipe, function


def main(path, *stages):
    recipe = yaml.safe_load(Path(path).read_text())
    out, log = Path(recipe["out"]), Path(recipe["out"]) / "training.json"
    processor = build_processor(recipe["shape"]["vision"]["image_size"], corpora(recipe).phrases())
    for stage in stages or STAGES:
        section, train = STAGES[stage]
        torch.manual_seed(recipe[section]["seed"])
        model, figures = build_model(recipe["shape"], processor.tokenizer), {}
        if stage != "text":
            # fresh eyes beside the text stage's weights: run again, alone or after the first, it ends the same
            done = MllamaForConditionalGeneration.from_pretrained(out, dtype=torch.float32).state_dict()
            fresh = model.to(torch.bfloat16).float().state_dict()
            model.load_state_dict({n: (fresh if learns_to_see(n, recipe) else done)[n] for n in fresh})
            figures = json.loads(log.read_text())
        figures[stage] = train(model, processor, recipe)
        model.to(torch.bfloat16).save_pretrained(out)
        processor.save_pretrained(out)
        log.write_text(json.dumps(figures, indent=1) + "\n")
        print(figures[stage])


if __name__ == "__main__":
    main(*sys.argv[1:])
