"""The policy: a frozen (4-bit) vision-language base, LoRA adapters, a value head; sampling and scoring of answers.

Sampling and the update see the same numbers: tokens are sampled from softmax(logits / T) without truncation and
`score` recomputes exactly that; token ids are kept, text is never re-tokenised. Knows no environment.
"""
import hashlib
import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

# ours first: lib sets up the libraries before they start
from lib.batching import Sequence, micro_batches, read_at_once
from lib.families import positions
from lib.loading import adapt, load
from lib.lora import _light, _merged
from lib.random_weights import spellable
from lib.settings import UserError, one_line

import bitsandbytes
import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForImageTextToText

transformers.utils.logging.disable_progress_bar()

LOGITS = 2**25  # logits that scoring holds at once: 128 MiB a copy in fp32
DATE = "26 Jul 2024"  # in Llama's template, which would put today's: a run continued tomorrow would read other prompts
PATCHES = 2**14  # image patches that are encoded at once where no gradient needs them


@dataclass
class Answer:
    """One sampled answer: ids (A,), their log-probs under the sampling distribution (A,), and V(s) before it."""
    ids: list
    logprobs: torch.Tensor
    value: float


def token_logprobs(logits, ids, temperature=1.0):
    """Log-probs of the chosen tokens and entropy of softmax(logits / temperature).

    Args: logits (A, V); ids (A,); temperature > 0.
    Returns: (A,) log-probs in nats, (A,) entropies in nats. fp32.
    """
    logprobs = torch.log_softmax(logits.float() / temperature, -1)  # (A, V)
    chosen = logprobs.gather(-1, ids[:, None]).squeeze(-1)
    return chosen, -(logprobs.exp() * logprobs.clamp(min=-1e9)).sum(-1)


class ValueHead(torch.nn.Module):
    """V(s) from the hidden state of the last prompt token; an MLP (paper: 4096-1024-512-1) or, with [], linear.

    The state is normalised first, so that one learning rate fits any base. Starts at V = 0. fp32.
    """

    def __init__(self, width, hidden):
        super().__init__()
        sizes, layers = [width, *hidden, 1], [torch.nn.LayerNorm(width)]
        for a, b in zip(sizes, sizes[1:]):
            layers += [torch.nn.Linear(a, b), torch.nn.ReLU()]
        self.net = torch.nn.Sequential(*layers[:-1])
        torch.nn.init.zeros_(self.net[-1].weight)
        torch.nn.init.zeros_(self.net[-1].bias)

    def forward(self, hidden):
        return self.net(hidden.float()).squeeze(-1)


class Policy:
    """Base + LoRA + value head.

    Args:
        model: cfg.model section. lora: cfg.lora section, or None: the parts in model.tune learn themselves.
        value_hidden, value_detach: cfg.ppo's; the value head exists for SFT too and is then not trained.
        seed: of the LoRA and value-head initialisation.
    Attributes: tokens, processed so far: text tokens {"train", "inference"} and image patches {.. "_patches"}.
    Raises: UserError for a model that cannot be loaded or a device that is not there.
    """

    def __init__(self, model, lora, value_hidden=(), value_detach=True, seed=0):
        self.device = _device(model.device)
        self.max_new_tokens, self.merge_for_sampling = model.max_new_tokens, model.merge_for_sampling
        self.sample_tokens, self.value_detach = model.sample_tokens, value_detach
        torch.manual_seed(seed)
        self.tokenizer, self.image_processor, base, self.eyes = load(model, self.device)
        self.special = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        self.parameters = sum(_numel(p) for p in base.parameters())  # N of the FLOP formulas
        language = self.eyes.parts["language"]
        self.parameters_eyes = sum(_numel(p) for n, p in base.named_parameters() if not re.search(language, n))
        self.net = adapt(base, self.eyes.parts, model.tune, lora)
        self.base = base  # LoRA layers sit inside the base
        width = self.base.config.get_text_config().hidden_size
        self.value_head = ValueHead(width, value_hidden).to(self.device)
        self.trainable = {n: p for n, p in self.net.named_parameters() if p.requires_grad}
        self.exact = self.base.dtype == torch.float32  # 16-bit sampling and scoring differ: see rl.py
        self.adapted = [m for m in self.net.modules() if isinstance(m, LoraLayer)]
        self._learn()
        self.tokens = {"train": 0, "inference": 0, "train_patches": 0, "inference_patches": 0}
        self._choose_tokens(model)
        self.checkpointing = model.gradient_checkpointing
        if self.checkpointing:
            self.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.in_rollout = False
        self.frozen_eyes = all(re.search(language, name) for name in self.trainable)  # features then stay
        self.features, self.cached, self.image_cache = {}, 0, model.image_cache * 2**30  # by id(image); bytes held, allowed
        self.net.eval()

    def _choose_tokens(self, model):
        """Which tokens are `never` sampled, (V,) bool, and which end an answer; with random weights, those whose text reads
        back as it was sampled and the `lengths` to which prompts and answers are brought."""
        self.never = torch.arange(self.base.lm_head.out_features, device=self.device) >= len(self.tokenizer)
        self.never[self.eyes.token:self.eyes.token + 1] = True  # (Llama's output layer has no such row)
        ends = self.base.generation_config.eos_token_id  # one, several or None
        ends = [self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends] * (ends is not None))]
        self.ends = torch.tensor(ends, device=self.device)
        self.lengths = None
        if model.random_init:
            self.lengths, self.max_new_tokens = model, model.answer_tokens
            says = spellable(self.tokenizer)
            self.filler = says[0]
            self.never = torch.ones_like(self.never).index_fill(0, torch.tensor(says, device=self.device), False)

    # ------------------------------------------------------------ observations in, ids out
    def encode(self, observations):
        """Prompts of observations {"messages", "image"}: the template writes the BOS, the tokenizer adds none.

        Returns: list of Sequences without spans. What a message spells is text: it never becomes a special token.
        """
        return [Sequence(self.eyes.expand(ids, o["image"]), [], o["image"])
                for o, ids in zip(observations, self._ids([self._filled(o["messages"]) for o in observations]))]

    def _ids(self, conversations):
        """Token ids of lists of messages."""
        texts = [self.tokenizer.apply_chat_template([{**m, "content": self._plain(m["content"])} for m in messages],
                                                    tokenize=False, add_generation_prompt=True, date_string=DATE)
                 for messages in conversations]
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def _filled(self, messages):
        """With random weights: the user's messages filled up to the prompt and revision lengths that the YAML gives."""
        if self.lengths is None:
            return messages
        filled, wanted = [], self.lengths.prompt_tokens
        for message in messages:
            filled.append(message)
            if message["role"] == "user":
                filler = self.decode([self.filler]) * (wanted - len(self._ids([filled])[0]))
                content = message["content"]
                filled[-1] = {**message, "content": content + filler if isinstance(content, str) else
                              [*content, {"type": "text", "text": filler}]}
                wanted += self.lengths.revision_tokens
        return filled

    def _plain(self, content):
        """Message content with special tokens that it spells broken up: <|image|> in an answer is no second image."""
        if isinstance(content, list):
            return [{**part, "text": self._plain(part["text"])} if "text" in part else part for part in content]
        for token in self.special:
            content = content.replace(token, f"{token[0]} {token[1:]}")
        return content

    def encode_answers(self, texts):
        """Answer ids with the end-of-turn token, as the model should write them; random weights: as many as in YAML."""
        if self.lengths is not None:
            return [[self.filler] * self.lengths.answer_tokens for _ in texts]
        return [ids + [self.tokenizer.eos_token_id] for ids in
                self.tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    # ------------------------------------------------------------ sampling
    @torch.no_grad()
    def sample(self, prompts, temperature, generator, max_new_tokens=None):
        """One answer per prompt, in batches of like length of at most model.sample_tokens padded prompt tokens.

        Args:
            prompts: list of N Sequences. temperature: 0 = greedy. generator: torch.Generator on the policy's device.
        Returns: list of N Answers. An answer that reaches max_new_tokens has no end-of-turn token.
        """
        answers = [None] * len(prompts)
        with self.fixed():
            for group in micro_batches([(p, i) for i, p in enumerate(prompts)], self.sample_tokens):
                batch = self._sample([p for p, _ in group], temperature, generator, max_new_tokens or self.max_new_tokens)
                for (_, i), answer in zip(group, batch):
                    answers[i] = answer
        return answers

    def _sample(self, prompts, temperature, generator, limit):
        """One batch: prompts padded left, finished rows leave it."""
        width = max(len(p.ids) for p in prompts)
        ids = torch.tensor([[self.tokenizer.pad_token_id] * (width - len(p.ids)) + p.ids for p in prompts],
                           device=self.device)
        mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts], device=self.device)  # (N, T)
        hidden, cache, sight, offset = self._read(ids, mask, [p.image for p in prompts])
        answers = [Answer([], [], v) for v in self.value_head(hidden).tolist()]
        self.tokens["inference"] += int(mask.sum())
        rows = torch.arange(len(prompts), device=self.device)  # which answer each live row writes
        for length in range(1, limit + 1):
            logits = self._logits(hidden)
            if temperature:
                probabilities = torch.softmax(logits / temperature, -1)
                token = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)  # (rows,)
            else:
                token = logits.argmax(-1)
            logprobs, _ = token_logprobs(logits, token, temperature or 1.0)
            for row, t, lp in zip(rows.tolist(), token.tolist(), logprobs.tolist()):
                answers[row].ids.append(t)
                answers[row].logprobs.append(lp)
            live = ~torch.isin(token, self.ends)
            if length == limit or not live.any():
                break
            if not live.all():  # finished rows stop costing
                keep = live.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                rows, token, mask, offset = rows[keep], token[keep], mask[keep], offset[keep]
                sight = {k: m[keep] for k, m in sight.items()}
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            hidden = self.eyes.reader(input_ids=token[:, None], attention_mask=mask, past_key_values=cache, use_cache=True,
                                      position_ids=mask.sum(1, keepdim=True) - 1 + offset, **sight).last_hidden_state[:, -1]
            self.tokens["inference"] += len(rows)
        for answer in answers:
            answer.logprobs = torch.tensor(answer.logprobs)
        return answers

    def _read(self, ids, mask, images):
        """Prompts (N, T) in parts of some rows, so that activations of a part alone lie beside the cache.

        Returns: last hidden states (N, C), the cache of all, and as of a family's prefill what further tokens need.
        """
        features, parts = self._features(images), []
        alike = len({image and image.size for image in images}) == 1  # else parts would have caches of different widths
        several = read_at_once(*ids.shape, self.base.lm_head.in_features) if alike else len(ids)
        for part in (slice(start, start + several) for start in range(0, len(ids), several)):
            whole, sight, offset = self._look(ids[part], mask[part], features[part])
            out = self.eyes.reader(attention_mask=mask[part], use_cache=True, **whole)
            parts.append((out.last_hidden_state[:, -1].clone(), out.past_key_values, sight, offset))
            del out, whole
        hidden, caches, sights, offsets = zip(*parts)
        for layer, *others in zip(*(cache.layers for cache in caches)):
            for kind in ("keys", "values") if others and layer.is_initialized else ():  # without an image not all layers are
                setattr(layer, kind, torch.cat([getattr(part, kind) for part in (layer, *others)]))
                for other in others:
                    setattr(other, kind, None)
        sight = {k: torch.cat([sight[k] for sight in sights]) for k in sights[0]}
        return torch.cat(hidden), caches[0], sight, torch.cat(offsets)

    @contextmanager
    def fixed(self):
        """For a rollout or an evaluation: inside, weights do not change, so each image is encoded once and LoRA layers are
        the `_merged` or `_light` of their weights. May be nested."""
        if self.in_rollout:
            yield
            return
        try:
            self.in_rollout = True
            with torch.no_grad():
                for layer in self.adapted:
                    layer.forward = _merged(layer) if self.merge_for_sampling else _light(layer, self.base.dtype, True)
            yield
        finally:
            self.in_rollout = False
            if not self.frozen_eyes:
                self.features.clear()
                self.cached = 0
            self._learn()

    def _learn(self):
        """LoRA layers follow their weights: in fp32 by peft's own forward, in 16 bits by `_light`."""
        for layer in self.adapted:
            vars(layer).pop("forward", None)
            if not self.exact:
                layer.forward = _light(layer, self.base.dtype, False)

    @torch.no_grad()
    def values(self, prompts):
        """V(s) of N prompts, (N,): the bootstrap of episodes that a rollout leaves unfinished."""
        return torch.tensor([a.value for a in self.sample(prompts, 0, None, max_new_tokens=1)])

    # ------------------------------------------------------------ images
    def _look(self, ids, mask, features):
        """How the language model reads a batch of whole prompts, ids and mask (B, T), with `_features` of their images.

        Returns: as of a family's prefill (backbone.py).
        """
        if features[0] is None:
            return {"input_ids": ids, "position_ids": positions(mask)}, {}, torch.zeros_like(ids[:, :1])
        return self.eyes.prefill(ids, mask, [tuple(f.to(self.device) for f in states) for states in features])

    def _features(self, images):
        """Of each image of a batch the features (backbone.py), or None of each. Raises: ValueError for a mix, which Mllama
        cannot read."""
        if all(image is None for image in images):
            return images
        if any(image is None for image in images):
            raise ValueError("a batch cannot mix prompts with and without an image")
        return self._recall(images) if self.in_rollout or self.frozen_eyes else self._encode(images)

    def _encode(self, images):
        """Features of each image (backbone.py), counted."""
        features = self.eyes.encode(images)
        self.tokens["train_patches" if torch.is_grad_enabled() else "inference_patches"] += \
            sum(map(self.eyes.looked_at, features))
        return features

    @torch.no_grad()
    def _recall(self, images):
        """`_encode` into host memory, where an image met again is found; the oldest give way."""
        found = {id(image): self.features[id(image)][1] for image in images if id(image) in self.features}
        new = list({id(image): image for image in images if id(image) not in found}.values())
        while new:
            several = max(1, PATCHES // self.eyes.tower_patches(new[0]))
            for image, features in zip(new, self._encode(new[:several])):
                found[id(image)] = [f.cpu() for f in features]
                size = sum(f.nbytes for f in features) + 3 * image.width * image.height
                self.features[id(image)] = image, found[id(image)], size  # the image, for its id to stay
                self.cached += size
            new = new[several:]
        while self.cached > self.image_cache:
            self.cached -= self.features.pop(next(iter(self.features)))[2]
        return [found[id(image)] for image in images]

    # ------------------------------------------------------------ scoring
    def score(self, sequences, temperature=1.0):
        """Log-probs of every answer token, as sampled at `temperature`, and values before each answer.

        Args: list of Sequences; S answers with A tokens in all, in the order of the sequences and their spans.
        Returns: dict with logprobs (A,), entropy (A,), turn (A,) = index of the answer 0..S-1, values (S,).
        Raises: RuntimeError inside `fixed`, where LoRA layers are copies that pass no gradient back.
        """
        if self.in_rollout:
            raise RuntimeError("score inside fixed(): leave the rollout first")
        width = max(len(s.ids) for s in sequences)
        ids = torch.full((len(sequences), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        rows, columns, turns, starts = [], [], [], []
        for row, sequence in enumerate(sequences):
            ids[row, :len(sequence.ids)] = torch.tensor(sequence.ids)
            mask[row, :len(sequence.ids)] = 1
            for start, end in sequence.spans:
                rows += [row] * (end - start)
                columns += range(start, end)
                turns += [len(starts)] * (end - start)
                starts.append((row, start - 1))
        ids, mask = ids.to(self.device), mask.to(self.device)  # (B, T)
        learning = torch.is_grad_enabled()
        self.net.train(learning and self.checkpointing)  # layers are checkpointed in this mode alone; nothing else differs
        try:
            whole, _, _ = self._look(ids, mask, self._features([s.image for s in sequences]))
            hidden = self.eyes.reader(attention_mask=mask, use_cache=False, **whole).last_hidden_state  # (B, T, C)
        finally:
            self.net.eval()
        rows, columns, turns = (torch.tensor(x, device=self.device) for x in (rows, columns, turns))
        several = max(1, LOGITS // len(self.never))
        judge = partial(checkpoint, self._judge, use_reentrant=False) if learning and self.checkpointing else self._judge
        judged = [judge(h, i, temperature) for h, i in  # answer positions alone
                  zip(hidden[rows, columns - 1].split(several), ids[rows, columns].split(several))]
        logprobs, entropy = map(torch.cat, zip(*judged))  # (A,) each
        states = hidden[tuple(torch.tensor(starts, device=self.device).T)]  # (S, C)
        self.tokens["train" if learning else "inference"] += int(mask.sum())
        return {"logprobs": logprobs, "entropy": entropy, "turn": turns,
                "values": self.value_head(states.detach() if self.value_detach else states)}

    def _judge(self, hidden, ids, temperature):
        return token_logprobs(self._logits(hidden), ids, temperature)

    def _logits(self, hidden):
        """(.., V) fp32; what may never be sampled has no probability."""
        return self.base.lm_head(hidden).float().masked_fill(self.never, -torch.inf)

    # ------------------------------------------------------------ weights
    def flops(self):
        """Model FLOPs spent so far: 6 N per trained token, 2 N per token read or sampled (paper, C.3).

        N is the whole model's. Beyond the paper, which counts text alone, image patches cost the vision part's N.
        """
        spent = lambda kind: 6 * self.tokens["train" + kind] + 2 * self.tokens["inference" + kind]  # noqa: E731
        return self.parameters * spent("") + self.parameters_eyes * spent("_patches")

    def snapshot(self):
        """A copy of the trainable weights: the start that a KL penalty refers to."""
        return {n: p.detach().clone() for n, p in self.trainable.items()}

    @contextmanager
    def weights_of(self, snapshot):
        """Score under a snapshot's weights without a second model."""
        own = {n: p.data for n, p in self.trainable.items()}
        for name, parameter in self.trainable.items():
            parameter.data = snapshot[name]
        try:
            yield
        finally:
            for name, parameter in self.trainable.items():
                parameter.data = own[name]

    def save(self, folder):
        """Adapter in peft's own format (or the whole model without LoRA), value head and library versions."""
        if self.net is self.base:
            self._save_whole(self.base, folder)
        else:
            self.net.save_pretrained(folder, save_embedding_layers=False)  # "auto" would ask the hub
        save_file(self.value_head.state_dict(), folder / "value_head.safetensors")
        (folder / "versions.txt").write_text("".join(f"{m.__name__}=={m.__version__}\n" for m in
                                                     (torch, transformers, peft, bitsandbytes)) + f"base=={self._digest()}\n")

    def _digest(self):
        """Of the norms and biases of a base under LoRA, by which a checkpoint knows its own again wherever it lies."""
        if self.net is self.base:
            return "none: the checkpoint is the whole model"
        frozen = [p for p in self.base.parameters() if p.dim() == 1 and not p.requires_grad]
        return hashlib.sha256(torch.cat(frozen).to("cpu", torch.bfloat16).view(torch.int16).numpy()).hexdigest()[:16]

    def save_merged(self, folder):
        """A normal model folder with W + s B A in place of W. For a policy without quantization; it is of no further use."""
        self._save_whole(self.base if self.net is self.base else self.net.merge_and_unload(), folder)

    def _save_whole(self, model, folder):
        for part in (model, self.tokenizer, self.image_processor):
            part.save_pretrained(folder)

    def load(self, folder, value_head=True):
        """Take over the weights of a checkpoint of the same shape. Raises: UserError naming what is wrong with it."""
        lora = self.net is not self.base
        try:
            if lora:
                weights = load_file(folder / "adapter_model.safetensors", device=str(self.device))
            else:  # the Auto classes know how names on disk map to the model's
                tuned = AutoModelForImageTextToText.from_pretrained(folder, dtype=self.base.dtype)
                weights = {n: p.data for n, p in tuned.named_parameters() if n in self.trainable}
            head = load_file(folder / "value_head.safetensors", device=str(self.device))
            base = re.search("base==(.*)", (folder / "versions.txt").read_text())
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(f"checkpoint {folder} is missing or damaged: {one_line(error)}") from None
        if base and base[1] != self._digest():
            raise UserError(f"checkpoint {folder} was trained on another base than the one in model.path")
        own = {n.replace(".default.", "."): p for n, p in self.trainable.items()}
        if {n: w.shape for n, w in weights.items()} != {n: p.shape for n, p in own.items()}:
            raise UserError(f"checkpoint {folder} has other {'LoRA' if lora else 'model'} shapes than this configuration "
                            "(lora.r, lora.target_modules, model.tune)")
        for n, parameter in own.items():
            parameter.data.copy_(weights[n])
        if value_head:
            try:
                self.value_head.load_state_dict(head)
            except RuntimeError:
                raise UserError(f"checkpoint {folder} has another value head than ppo.value_hidden") from None


def _numel(parameter):
    state = getattr(parameter, "quant_state", None)  # a 4-bit tensor packs two weights per element
    return state.shape.numel() if state is not None else parameter.numel()


def _device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device=cuda, but PyTorch sees no GPU here; use model.device=cpu")
    return torch.device(name)
