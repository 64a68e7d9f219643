"""The policy: a frozen (4-bit) vision-language base, LoRA adapters and a value head.

It does two things. `sample` writes one answer per prompt, token by token. `score` reads whole
conversations in one pass and gives the log-probs of the answers' tokens and the value before each
answer.

Why both give the same log-probs: tokens are sampled from softmax(logits / T) without truncation,
and `score` computes that softmax, with the same mask of forbidden tokens, from the very ids that
were sampled; weights merged for sampling are the same W + s B A. In fp32 they agree to rounding.
In 16 bits reading a whole text and reading it token by token round differently, so that rl.py takes
its old log-probs from `score` as well. (In a later prompt an answer stands as text and gets its ids
anew; lib/batching.pack notices if they differ.) tests/test_policy.py and test_backbone.py hold it.

Images are encoded in `_features`: while their weights stay as they are (in a rollout, or where only
the language model learns) once, for as long as lib/images.py remembers them; otherwise in every
forward pass.

Letters in comments: N prompts, B conversations, S answers, T tokens of the longest, A answer
tokens in all, C the width of hidden states, V the vocabulary. Knows no environment.
"""
import math
import re
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

# ours first: lib sets up the libraries before they start
from lib.batching import micro_batches
from lib.decoding import Decoding, join, truncated
from lib.errors import UserError
from lib.families import text_only
from lib.head import logits_in_float32
from lib.images import ImageFeatures
from lib.loading import load_base
from lib.lora import add_lora, lora_layers, merged_weights
from lib.padding import answer_tokens, pad_left, pad_right
from lib.prompts import PromptEncoder
from lib.random_weights import FilledPromptEncoder
from lib.results import Nucleus
from lib.weights import load_weights, save_merged, save_weights

import torch
import transformers
from transformers import DynamicCache
from torch.utils.checkpoint import checkpoint

transformers.utils.logging.disable_progress_bar()
# At T = 0.2 most probabilities and gradients are below 1e-38, and processors are many times slower
# on numbers so small than on 0.
torch.set_flush_denormal(True)

LOGITS_AT_ONCE = 2**25  # logits that scoring holds at once: 128 MiB a copy in fp32
STATES_AT_ONCE = {  # numbers in the hidden states of prompts that are read at once
    "cuda": 2**25,  # 8192 tokens of the 11B
    "cpu": 2**16}  # 512 tokens of the mini, which stay in a core's caches
PHASES = ("train", "inference", "train_patches", "inference_patches")  # what tokens are counted by


@dataclass
class Answer:
    """One sampled answer: ids (A,), their log-probs under the sampling distribution (A,), and the
    value V(s) before it."""
    ids: list
    logprobs: torch.Tensor
    value: float


def token_logprobs(logits, ids, temperature=1.0):
    """Log-probs of the chosen tokens and entropy of softmax(logits / temperature).

    Args: logits (A, V); ids (A,); temperature > 0.
    Returns: (A,) log-probs in nats, (A,) entropies in nats. fp32.
    """
    scaled = logits.float() / temperature
    logprobs = torch.log_softmax(scaled, -1)  # (A, V)
    chosen = logprobs.gather(-1, ids[:, None]).squeeze(-1)  # (A,)
    probabilities = torch.softmax(scaled, -1)  # exp(logprobs) takes 20 times as long near 0
    entropy = -(probabilities * logprobs.clamp(min=-1e9)).sum(-1)  # (A,); 0 * inf is no number
    return chosen, entropy


class ValueHead(torch.nn.Module):
    """V(s) from the hidden state of the last prompt token, in fp32; starts at V = 0.

    An MLP (paper: 4096-1024-512-1) or, with hidden = [], linear. The state is normalised first,
    so that one learning rate fits any base.
    """

    def __init__(self, width, hidden):
        super().__init__()
        layers = [torch.nn.LayerNorm(width)]
        for size in hidden:
            layers += [torch.nn.Linear(width, size), torch.nn.ReLU()]
            width = size
        last = torch.nn.Linear(width, 1)
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
        self.net = torch.nn.Sequential(*layers, last)

    def forward(self, hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            return self.net(hidden.float()).squeeze(-1)  # (..., C) -> (...)


class Policy:
    """Base + LoRA + value head.

    Args:
        model: cfg.model section.
        lora: cfg.lora section, or None: the parts in model.tune learn themselves.
        value_hidden, value_detach: cfg.ppo's; the value head exists for SFT too, untrained.
        seed: of the initial LoRA and value-head weights.
    Attributes:
        trainable: {name: parameter} of what learns, the value head apart.
        tokens: processed so far, by PHASES; images are counted in patches.
        official_extra: tokens that the official code would count in addition (`official_flops`).
        exact: sampling and scoring agree to rounding; in 16 bits they do not (see rl.py).
        scaler: of the loss, for `training.clipped_step`.
    Raises: UserError for a model that cannot be loaded or a device that is not there.
    """

    def __init__(self, model, lora, value_hidden=(), value_detach=True, seed=0):
        self.sample_tokens = model.sample_tokens
        self.merge_for_sampling = model.merge_for_sampling
        self.checkpointing = model.gradient_checkpointing
        self.value_detach = value_detach
        self.device = _device(model.device)
        self.states_at_once = STATES_AT_ONCE.get(self.device.type, STATES_AT_ONCE["cuda"])
        torch.manual_seed(seed)
        self.tokenizer, self.image_processor, self.base, self.family = load_base(model, self.device)
        self._count_parameters()  # before LoRA adds its own
        self.net = add_lora(self.base, self.family.parts, model.tune, lora)  # changes base in place
        self.has_lora = lora is not None
        width = self.base.config.get_text_config().hidden_size
        self.value_head = ValueHead(width, value_hidden).to(self.device)
        self.trainable = {n: p for n, p in self.net.named_parameters() if p.requires_grad}
        self.dtype = getattr(torch, model.dtype)  # of the text; see families.parts_in_float32
        self.exact = self.dtype == torch.float32
        # active in float16 only, whose gradients would vanish: see lib/training.py
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=model.dtype == "float16")
        self.tokens = dict.fromkeys(PHASES, 0)
        self.official_extra = {"train": 0, "inference": 0}
        if self.checkpointing:
            self.base.gradient_checkpointing_enable({"use_reentrant": False})
        self._set_up_text(model)
        self._set_up_images(model)
        self.in_inference = False
        self.values_alone = False
        self.net.eval()  # always, but where _hidden_states checkpoints

    def _count_parameters(self):
        """N of the FLOP formulas: of the whole base, and of what works on image patches."""
        sizes = {name: _numel(p) for name, p in self.base.named_parameters()}
        language = self.family.parts["language"]
        vision = [name for name in sizes if not re.search(language, name)]
        self.parameters = sum(sizes.values())
        self.parameters_vision = sum(sizes[name] for name in vision)

    def _set_up_text(self, model):
        """How text becomes ids, which tokens may be sampled, and which end an answer."""
        vocabulary = torch.arange(self.base.lm_head.out_features, device=self.device)
        forbidden = (vocabulary >= len(self.tokenizer)) | (vocabulary == self.family.image_token)
        if model.random_init:
            self.encoder = FilledPromptEncoder(self.tokenizer, self.family, model)
            spellable = torch.tensor(self.encoder.spellable, device=self.device)
            forbidden = ~torch.isin(vocabulary, spellable)  # what is sampled must read back
        else:
            self.encoder = PromptEncoder(self.tokenizer, self.family, model.thinking)
        self.max_new_tokens = model.answer_tokens if model.random_init else model.max_new_tokens
        self.forbidden = forbidden  # (V,) bool
        ends = self.base.generation_config.eos_token_id  # one, several or None
        ends = ends if isinstance(ends, list) else [ends]
        ends = [self.tokenizer.eos_token_id] + [end for end in ends if end is not None]
        self.end_tokens = torch.tensor(ends, device=self.device)

    def _set_up_images(self, model):
        language = self.family.parts["language"]
        self.vision_is_frozen = all(re.search(language, name) for name in self.trainable)
        self.images = ImageFeatures(self.family, model.image_cache * 2**30)

    def encode(self, observations):
        """Prompts (Sequences) of observations {"messages", "image"}."""
        return self.encoder.encode(observations)

    def encode_answers(self, texts):
        """Answer ids, the end-of-turn token included."""
        return self.encoder.encode_answers(texts)

    def decode(self, ids):
        """Text of answer ids, thoughts included (lib/answers.final_answer leaves them out)."""
        return self.encoder.opened + self.encoder.decode(ids)

    # ------------------------------------------------------------ sampling
    @torch.no_grad()
    def sample(self, prompts, temperature, generator, max_new_tokens=None):
        """One answer per prompt, in batches of like length.

        Args:
            prompts: list of N Sequences; a batch has at most model.sample_tokens padded tokens.
            temperature: 0 = greedy; a Nucleus (lib/results.py) truncates, as for evaluation alone.
            generator: torch.Generator on the policy's device.
        Returns: list of N Answers. One that reaches max_new_tokens has no end-of-turn token.
        """
        limit = max_new_tokens or self.max_new_tokens
        answers = [None] * len(prompts)
        items = [(prompt, place) for place, prompt in enumerate(prompts)]
        with self.inference():
            for group in micro_batches(items, self.sample_tokens):
                batch = [prompt for prompt, _ in group]
                with self._autocast():
                    sampled = self._sample_batch(batch, temperature, generator, limit)
                for (_, place), answer in zip(group, sampled):
                    answers[place] = answer
        return answers

    def _sample_batch(self, prompts, temperature, generator, limit):
        """Answers to N prompts side by side; finished rows leave the batch."""
        hidden, decoding = self._prefill(prompts)  # (N, C)
        answers = [Answer([], [], value) for value in self.value_head(hidden).tolist()]
        writing = answers  # the unfinished ones, one per row
        for length in range(1, limit + 1):
            tokens, logprobs = self._choose(self._logits(hidden), temperature, generator)
            for answer, token, logprob in zip(writing, tokens.tolist(), logprobs.tolist()):
                answer.ids.append(token)
                answer.logprobs.append(logprob)
            unfinished = (~torch.isin(tokens, self.end_tokens)).nonzero().squeeze(1)  # rows
            if length == limit or not len(unfinished):
                break
            if len(unfinished) < len(writing):
                decoding.keep(unfinished)
                tokens = tokens[unfinished]
                writing = [writing[row] for row in unfinished.tolist()]
            hidden = decoding.step(tokens)
            self.tokens["inference"] += len(writing)
        for answer in answers:
            answer.logprobs = torch.tensor(answer.logprobs)
        return answers

    def _choose(self, logits, temperature, generator):
        """Sampled or likeliest tokens (N,) and their log-probs (N,), from logits (N, V).

        Raises: UserError if the logits are not finite.
        """
        largest = logits.amax(-1)  # (N,)
        if (largest.isnan() | largest.isinf()).any():  # on a GPU, multinomial would end the process
            raise UserError("the policy has no finite logits to sample from; if it was trained, "
                            "lower sft.lr or ppo.lr (the last checkpoint is intact)")
        if isinstance(temperature, Nucleus):
            logits, temperature = truncated(logits / temperature.T, temperature.top_p), 1.0
        if temperature:
            probabilities = torch.softmax(logits / temperature, -1)
            tokens = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        else:
            tokens = logits.argmax(-1)
        logprobs, _ = token_logprobs(logits, tokens, temperature or 1.0)
        return tokens, logprobs

    def _prefill(self, prompts):
        """Read N prompts, a few rows at a time, so that only their activations need memory beside
        the growing cache. Returns: last hidden states (N, C), Decoding."""
        features = self._features([p.image for p in prompts])
        self.tokens["inference"] += sum(len(p.ids) for p in prompts)
        self._count_official_extra("inference", prompts, features)
        rows = self._rows_at_once(prompts)
        states, parts = [], []
        for start in range(0, len(prompts), rows):
            part = slice(start, start + rows)
            hidden, decoding = self._prefill_part(prompts[part], features[part])
            states.append(hidden)
            parts.append(decoding)
        return torch.cat(states), join(parts)

    def _rows_at_once(self, prompts):
        """How many prompts are read at once, so that their hidden states hold at most
        states_at_once numbers; parts are of even size."""
        sizes = {p.image.size for p in prompts if p.image is not None}
        if len(sizes) > 1:  # the caches of cross-attention would have different widths
            return len(prompts)
        width = max(len(p.ids) for p in prompts)
        states = len(prompts) * width * self.base.lm_head.in_features
        parts = math.ceil(states / self.states_at_once)
        return math.ceil(len(prompts) / parts)

    def _prefill_part(self, prompts, features):
        ids, mask = pad_left(prompts, self.tokenizer.pad_token_id)
        ids, mask = ids.to(self.device), mask.to(self.device)  # (rows, T)
        inputs = self._text_inputs(ids, mask, features)
        cache = DynamicCache()  # keeps whole prompts; a model's own may keep a window only
        out = self.family.text_model(attention_mask=mask, use_cache=True, past_key_values=cache,
                                     **inputs.prompt)
        decoding = Decoding(self.family.text_model, out.past_key_values, mask, inputs)
        return out.last_hidden_state[:, -1].clone(), decoding  # (rows, T, C) is freed: (rows, C)

    @torch.no_grad()
    def values(self, prompts):
        """V(s) of N prompts, (N,): the bootstrap of episodes that a rollout leaves unfinished."""
        answers = self.sample(prompts, 0, None, max_new_tokens=1)
        return torch.tensor([answer.value for answer in answers])

    @contextmanager
    def inference(self):
        """For a rollout or an evaluation: inside, weights do not change, so features of images are
        kept (as far as model.image_cache reaches; afterwards only if nothing that sees learns) and,
        with model.merge_for_sampling, LoRA is merged into dense copies. May be nested."""
        if self.in_inference:
            yield
            return
        merge = self.has_lora and self.merge_for_sampling
        self.in_inference = True
        try:
            with merged_weights(lora_layers(self.net)) if merge else nullcontext():
                yield
        finally:
            self.in_inference = False
            if not self.vision_is_frozen:
                self.images.clear()

    # ------------------------------------------------------------ scoring
    def merged(self):
        """A context for scoring, backward passes included, while weights do not change, such as all
        of one optimiser step: in float32 with model.merge_for_sampling LoRA is merged into dense
        copies, whose gradient reaches it on leaving. It changes speed and memory, and results by
        rounding alone."""
        if not (self.has_lora and self.exact and self.merge_for_sampling):
            return nullcontext()
        return merged_weights(lora_layers(self.net), learn=torch.is_grad_enabled())

    def score(self, sequences, temperature=1.0):
        """Log-probs of every answer token, as sampled at `temperature`, and values before answers.

        Args: list of B Sequences with S answers of A tokens in all, in the order of the sequences
            and their spans.
        Returns: dict with logprobs (A,), entropy (A,), answer_of (A,): to which of the answers
            0..S-1 a token belongs, and values (S,).
        Raises: RuntimeError within `inference`, where merged layers pass no gradient back.
        """
        if self.in_inference:
            raise RuntimeError("score within inference(): leave the rollout first")
        with self._autocast():
            ids, hidden = self._hidden_states(sequences)  # (B, T), (B, T, C)
            at = answer_tokens(sequences, self.device)
            before = hidden[at.row, at.column - 1]  # (A, C): a token is predicted one place earlier
            logprobs, entropy = self._answer_logprobs(before, ids[at.row, at.column], temperature)
        states = hidden[at.state_row, at.state_column]  # (S, C)
        values = self.value_head(states.detach() if self.value_detach else states)
        return {"logprobs": logprobs, "entropy": entropy, "answer_of": at.answer, "values": values}

    def _hidden_states(self, sequences):
        """ids (B, T) and final hidden states (B, T, C) of whole conversations."""
        ids, mask = pad_right(sequences, self.tokenizer.pad_token_id)
        ids, mask = ids.to(self.device), mask.to(self.device)
        learning = self._learning()
        self.tokens["train" if learning else "inference"] += sum(len(s.ids) for s in sequences)
        # layers are checkpointed in training mode alone; nothing else differs by it
        checkpointed = learning and self.checkpointing
        if checkpointed:
            self.net.train()
        try:
            features = self._features([s.image for s in sequences])
            self._count_official_extra("train" if learning else "inference", sequences, features)
            inputs = self._text_inputs(ids, mask, features)
            out = self.family.text_model(attention_mask=mask, use_cache=False, **inputs.prompt)
        finally:
            if checkpointed:
                self.net.eval()
        return ids, out.last_hidden_state

    def _answer_logprobs(self, hidden, ids, temperature):
        """Log-probs (A,) and entropies (A,) from hidden states (A, C), a chunk at a time: logits
        are V wide, and needed for answer tokens alone."""
        def logprobs_of(hidden, ids):
            return token_logprobs(self._logits(hidden), ids, temperature)

        if self._learning() and self.checkpointing:
            logprobs_of = partial(checkpoint, logprobs_of, use_reentrant=False)
        chunk = max(1, LOGITS_AT_ONCE // len(self.forbidden))
        logprobs, entropies = [], []
        for some_hidden, some_ids in zip(hidden.split(chunk), ids.split(chunk)):
            chosen, entropy = logprobs_of(some_hidden, some_ids)
            logprobs.append(chosen)
            entropies.append(entropy)
        return torch.cat(logprobs), torch.cat(entropies)

    # ------------------------------------------------------------ what both do
    def _logits(self, hidden):
        """(..., C) -> (..., V) in fp32; what may never be sampled has no probability."""
        head = self.base.lm_head
        logits = head(hidden) if self.exact else logits_in_float32(head, hidden)
        return logits.masked_fill(self.forbidden, -torch.inf)

    def _text_inputs(self, ids, mask, features):
        """How the text model reads prompts (B, T): families.TextInputs."""
        if features[0] is None:
            return text_only(ids, mask)
        on_device = []
        for image in features:
            on_device.append(tuple(part.to(self.device) for part in image))
        return self.family.text_inputs(ids, mask, on_device)

    def _features(self, images):
        """Features of each image of a batch, or None of each.

        Raises: ValueError for a mix, which Mllama cannot read.
        """
        if all(image is None for image in images):
            return images
        if any(image is None for image in images):
            raise ValueError("a batch cannot mix prompts with and without an image")
        may_recall = self.in_inference or self.vision_is_frozen
        encode = self.images.recall if may_recall else self.images.encode
        with self._vision_precision():
            features, patches = encode(images)
        learning = self._learning() and not may_recall
        self.tokens["train_patches" if learning else "inference_patches"] += patches
        return features

    def _count_official_extra(self, phase, sequences, features):
        """Count what the official code would in addition to `tokens`: every prefix of a
        conversation up to the end of an answer anew, and an image that is one token in each of them
        by its patches."""
        for sequence, image in zip(sequences, features):
            ends = [end for _, end in sequence.spans] or [len(sequence.ids)]
            self.official_extra[phase] += sum(ends) - len(sequence.ids)
            if image is not None and sequence.ids.count(self.family.image_token) == 1:
                self.official_extra[phase] += len(ends) * (self.family.count_patches(image) - 1)

    def _autocast(self):
        """A 16-bit base computes LoRA in its own dtype, whose weights and gradients are fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=not self.exact)

    def _vision_precision(self):
        """Vision that is in float32 beside a text in float16 computes so."""
        widened = self.dtype == torch.float16 and self.family.parts_in_float32
        return torch.autocast(self.device.type, enabled=False) if widened else nullcontext()

    def _learning(self):
        """Whether a gradient is to reach the model's own weights."""
        return torch.is_grad_enabled() and not self.values_alone

    def learn(self, values_alone):
        """From now on all learns, or the value head alone, while the model is only read."""
        self.values_alone = values_alone
        for parameter in self.trainable.values():
            parameter.requires_grad_(not values_alone)

    # ------------------------------------------------------------ weights
    def flops(self):
        """Model FLOPs spent so far: 6 N per trained token, 2 N per token read or sampled (C.3).

        N is the whole model's. Beyond the paper, which counts text alone, image patches cost the
        parameters of tower and projector.
        """
        tokens = 6 * self.tokens["train"] + 2 * self.tokens["inference"]
        patches = 6 * self.tokens["train_patches"] + 2 * self.tokens["inference_patches"]
        return self.parameters * tokens + self.parameters_vision * patches

    def official_flops(self):
        """As the official code counts: all tokens, visual ones too, at the whole model's N, and
        every prefix of a conversation anew. NaN for a run that began before this was counted."""
        train = self.tokens["train"] + self.official_extra["train"]
        inference = self.tokens["inference"] + self.official_extra["inference"]
        return self.parameters * (6 * train + 2 * inference)

    def snapshot(self):
        """A copy of the trainable weights: the start that a KL penalty refers to."""
        return {name: p.detach().clone() for name, p in self.trainable.items()}

    @contextmanager
    def weights_of(self, snapshot):
        """Score under a snapshot's weights without a second model."""
        own = {name: p.data for name, p in self.trainable.items()}
        for name, parameter in self.trainable.items():
            parameter.data = snapshot[name]
        try:
            yield
        finally:
            for name, parameter in self.trainable.items():
                parameter.data = own[name]

    def save(self, folder):
        """Adapter, value head and versions into a folder (lib/weights.py)."""
        save_weights(self, folder)

    def load(self, folder, value_head=True):
        """Take over the weights of a checkpoint. Raises: UserError if they do not fit."""
        load_weights(self, folder, value_head)

    def save_merged(self, folder):
        """A normal model folder with LoRA merged in; for a policy without quantisation."""
        save_merged(self, folder)


def _numel(parameter):
    """Weights in a parameter; a 4-bit tensor packs two of them per element."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def _device(name):
    available = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if available else "cpu"
    if name == "cuda" and not available:
        raise UserError("model.device=cuda, but PyTorch sees no GPU here; use model.device=cpu")
    return torch.device(name)
