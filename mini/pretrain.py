"""Make the mini backbone: a Llama-3.2-Vision-shaped model of under 2 M parameters, trained from scratch on a laptop.

    python mini/pretrain.py mini/gp.yaml

The backbone stands in for pre-training: it has met every rule for J, Q and K in general form, and conversations in
which imperfect authors try, are corrected, and often just say the same thing again. It never meets a value
multiset of the `unseen` split. What it knows and how well is in mini/README.md.
"""
import json
import random
import re
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
import gp  # noqa: E402

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
def phrases():
    """Constant pieces of the conversations, so that a turn is some 20 tokens; digits, ranks, operators stay bytes."""
    prompt = gp.PROMPT.replace("{target}", "24").replace("{{", "{").replace("}}", "}")
    pieces = [p for p in re.split(r"\{[JQK]\}", prompt.replace("{cards}", "["))]
    pieces += ["10", "11", "12", "13", "24", '=24"}', '{"cards": [', '], "number": [', '], "formula": "']
    pieces += [f'"{rank}"' for rank in gp.RANKS] + [f', "{rank}"' for rank in gp.RANKS]
    pieces += [f", {n}" for n in range(1, 14)]
    start, end = gp.RETRY.split("{reason}")
    for reason in ("the formula equals # instead of 24", "the number # is not on the table", "the number # is not used",
                   "the number # is used too often", "the number # is used too rarely",
                   "the formula has an unbalanced bracket", "an operator is missing in the formula",
                   "a number is missing in the formula", "the formula divides by zero", "the formula is too long",
                   "the formula is empty", 'no "formula" was found in the answer'):
        pieces += [p for p in (start + reason + end).split("#")]
    return list(dict.fromkeys(pieces))


def build_processor(image_size):
    """Byte-level tokenizer with phrase tokens, chat template and image processor, saved like any other model's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    tokenizer.add_tokens([AddedToken(p, normalized=False, special=False) for p in phrases()])
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


# ---------------------------------------------------------------- corpus
class Corpus:
    """Conversations of imperfect authors about hands of the train split, under many rules for J, Q and K."""

    def __init__(self, data, seed):
        self.data, self.rng, self.envs = data, random.Random(seed), {}

    def env(self):
        kind = self.rng.choices(("ten", "face", "other"), [self.data["ten"], self.data["face"], self.data["other"]])[0]
        rule = {r: self.rng.randint(1, 13) for r in "JQK"} if kind == "other" else kind
        if kind == "other":  # building the table of a new rule costs milliseconds: keep some and replace them slowly
            slot = ("other", self.rng.randrange(40))
            if self.rng.random() > 0.002 and slot in self.envs:
                return self.envs[slot]
        else:
            slot = kind
        if slot not in self.envs or kind == "other":
            self.envs[slot] = gp.GeneralPoints(rule=rule, split="train", expert="varied", require_face=kind == "face")
        return self.envs[slot]

    def conversation(self):
        """Chat turns of one author: tries, the verifier's text, and the same again or another try."""
        env, data, answer = self.env(), self.data, None
        obs, _ = env.reset(self.rng.getrandbits(48))
        while not env.done:
            if answer is None or self.rng.random() >= data["repeat"]:
                if self.rng.random() < data["right"]:
                    env.expert_kind = "canonical" if self.rng.random() < data["canonical"] else "varied"
                    answer = env.expert()
                else:
                    answer = env.mistake()
            obs, *_ = env.step(answer)
            if self.rng.random() >= data["continue"]:
                break
        messages = obs["messages"]
        return messages if messages[-1]["role"] == "assistant" or env.done else messages[:-1]

    def arithmetic(self):
        """Plain sums, as any corpus has them: formula=value, one after another."""
        lines = []
        for _ in range(8):
            numbers = [self.rng.randint(1, 13) for _ in range(self.rng.randint(2, 4))]
            formula = str(numbers[0])
            for n in numbers[1:]:
                if not formula.isdigit() and self.rng.random() < 0.4:
                    formula = f"({formula})"
                op, left = self.rng.choice("+-*/"), self.rng.random() < 0.3
                formula = f"{n}{op}({formula})" if left and not formula.isdigit() else f"{formula}{op}{n}"
            try:
                lines.append(f"{formula}={gp.compute(formula)[0]}")
            except gp.FormulaError:
                continue
        return " ".join(lines)


def batches(corpus, tokenizer, tokens):
    """Endless (input_ids, attention_mask, labels) of about `tokens` tokens; documents of like length together."""
    template = lambda m: tokenizer.apply_chat_template(m, tokenize=False)  # noqa: E731
    while True:
        texts = []
        for _ in range(2048):
            if corpus.rng.random() < corpus.data["arithmetic"]:
                texts.append(SPECIAL["bos"] + corpus.arithmetic() + SPECIAL["eos"])
            else:
                texts.append(render(corpus.conversation()))
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
            yield collate(chunk, tokenizer)


def render(messages):
    """The chat template without Jinja, 50 times faster; a test holds the two equal."""
    text = SPECIAL["bos"]
    for m in messages:
        user = m["role"] == "user"
        text += (SPECIAL["user"] if user else SPECIAL["assistant"]) + m["content"] + ("" if user else SPECIAL["eos"])
    return text


def collate(documents, tokenizer):
    """Right-padded batch; the first prompt carries no loss (its cards are chance), everything after it does."""
    assistant = tokenizer.convert_tokens_to_ids(SPECIAL["assistant"])
    width = max(map(len, documents))
    ids = torch.full((len(documents), width), tokenizer.pad_token_id)
    labels = torch.full((len(documents), width), -100)
    for row, document in enumerate(documents):
        start = document.index(assistant) + 1 if assistant in document else 1
        ids[row, :len(document)] = torch.tensor(document)
        labels[row, start:len(document)] = torch.tensor(document[start:])
    return ids, (ids != tokenizer.pad_token_id).long(), labels


# ---------------------------------------------------------------- training
def optimizers(model, train):
    """Muon for the matrices inside the blocks, AdamW for embeddings, output layer and vectors."""
    body = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    ids = {id(p) for p in body}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [torch.optim.Muon(body, lr=train["lr_muon"], weight_decay=0.0),
            torch.optim.AdamW(rest, lr=train["lr_adamw"], betas=(0.9, 0.95), weight_decay=0.0)]


def main(path):
    recipe = yaml.safe_load(Path(path).read_text())
    train, out = recipe["train"], Path(recipe["out"])
    torch.manual_seed(train["seed"])
    processor = build_processor(recipe["shape"]["vision"]["image_size"])
    tokenizer = processor.tokenizer
    model = build_model(recipe["shape"], tokenizer)
    opts = optimizers(model, train)
    base = [[g["lr"] for g in o.param_groups] for o in opts]
    stream = batches(Corpus(recipe["data"], train["seed"]), tokenizer, train["batch_tokens"])
    seen, losses, start = 0, [], time.time()
    bar = tqdm(total=train["tokens"], unit="tok", unit_scale=True)
    while seen < train["tokens"]:
        ids, mask, labels = next(stream)
        share = seen / train["tokens"]
        factor = min(1.0, (1 - share) / train["decay"], 0.05 + seen / train["warmup_tokens"])
        for o, rates in zip(opts, base):
            for group, rate in zip(o.param_groups, rates):
                group["lr"] = rate * factor
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        for o in opts:
            o.step()
            o.zero_grad()
        seen += int(mask.sum())
        losses.append(loss.item())
        bar.update(int(mask.sum()))
        if len(losses) % 20 == 0:
            bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}")
    model.to(torch.bfloat16).save_pretrained(out)
    processor.save_pretrained(out)
    figures = {"tokens": seen, "steps": len(losses), "loss": sum(losses[-50:]) / 50, "seconds": time.time() - start,
               "parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__}
    (out / "training.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(figures)


if __name__ == "__main__":
    main(sys.argv[1])
