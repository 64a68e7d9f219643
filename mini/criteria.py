"""Figures of a backbone and of its Init that mini/criteria.md decides by; no SFT arm, no PPO.

    python sft.py CONFIG model.path=BACKBONE run.dir=RUN sft.steps=120 sft.save_every=10
    python mini/criteria.py CONFIG model.path=BACKBONE run.dir=RUN

Plays tuning hands or walks (the evaluation's seed plus 100), sampled at the leading temperature:
the bare backbone, then SFT's checkpoints from the first on until one is Init.
"""
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import yaml

import gp
import virl
from lib.batching import Sequence
from lib.errors import UserError, run_main
from lib.runs import arm_name, checkpoints
from lib.settings import load
from mini import corpus_virl
from mini.documents import SPECIAL
from policy import Policy
from rollout import evaluate, evaluation_seeds, make_env

HANDS, STEPS = 500, 400
TUNING = 100  # added to the evaluation's seed: its hands are never those of the results
ILLEGAL = 0.05  # Init: at most so many first answers are illegal, ...
LEAST = 0.55  # ... and, in GP, so much is solved


def played(policy, cfg, variant, verify_iters):
    """Records of rollout.evaluate on the tuning problems of a variant."""
    (split, n), *_ = cfg.eval.splits.items()
    changes = {"split": split, **cfg.eval.variants[variant]}
    return evaluate(policy, cfg.env, min(n, HANDS), cfg.eval.seed + TUNING, verify_iters,
                    cfg.eval.temperatures[0], cfg.eval.batch_size, **changes)


def share(records, metric):
    """Share of right ones in all records together; a walk that never stopped counts no stop."""
    right = of = 0
    for record in records:
        more_right, more = record["counts"].get(metric, (0, 0))
        right, of = right + more_right, of + more
    return right / max(1, of)


def turns_of(records):
    """All Turns of some episodes."""
    return list(chain(*[record["turns"] for record in records]))


def categories(records):
    """{category: share of first answers}."""
    first = [turn.info["category"] for turn in turns_of(records) if turn.info["attempt"] == 1]
    return {name: n / len(first) for name, n in Counter(first).most_common()}


def in_format(records, key):
    """Share of all answers that hold the task's key."""
    turns = turns_of(records)
    return sum(key in turn.text for turn in turns) / len(turns)


def describe(name, records, metrics):
    shares = ", ".join(f"{metric} {share(records, metric):.1%}" for metric in metrics)
    kinds = ", ".join(f"{kind} {part:.0%}" for kind, part in categories(records).items())
    print(f"{name}: {shares}; first answers: {kinds}", flush=True)


def puzzles_solved(policy, env, seeds):
    """Share of hands that the backbone solves as a puzzle line, greedily."""
    texts = []
    for seed in seeds:
        env.reset(seed)
        numbers = ", ".join(str(env.number[card]) for card in env.cards)
        texts.append((f"{SPECIAL['bos']}{numbers} make 24: ", env.values))
    ids = policy.tokenizer([text for text, _ in texts], add_special_tokens=False)["input_ids"]
    answers = policy.sample([Sequence(prompt, []) for prompt in ids], 0, None)
    solved = 0
    for (_, values), answer in zip(texts, answers):
        formula = policy.decode(answer.ids).split("\n")[0]
        solved += gp.grade(formula, values, 24)[0] == "correct"
    return solved / len(texts)


def steps_known(policy, rule, temperature):
    """Shares of all next steps, and of turns, that the backbone knows in plain words.

    On the routes of the split `unseen`, whose next steps are asked for as the corpus asks.
    """
    recipe = yaml.safe_load((Path(__file__).parent / "virl.yaml").read_text())
    corpus = corpus_virl.Corpus({**recipe["data"], "routes": 1, "turns": 0}, TUNING)
    corpus.env = virl.Navigation(split="unseen", milestones=recipe["data"]["milestones"])
    asked, expected, at_turns = [], [], []
    for _ in range(STEPS):
        at, _ = corpus.position()
        manner = corpus.rng.choice(corpus_virl.MANNERS)
        now = corpus_virl.NOW.format(seen=corpus.env.rail[at].observation)
        said = f"{corpus.map(rule)}{corpus.story(manner, at, rule)}{now} {manner.ask}"
        asked.append({"messages": [{"role": "user", "content": said}], "image": None})
        expected.append(manner.next_step(corpus.env, at, rule))
        at_turns.append(corpus.env.rail[at].action == "turn")
    generator = torch.Generator().manual_seed(TUNING)
    answers = policy.sample(policy.encode(asked), temperature, generator)
    right = [policy.decode(answer.ids) == step for answer, step in zip(answers, expected)]
    turns = [known for known, turn in zip(right, at_turns) if turn]
    return sum(right) / len(right), sum(turns) / len(turns)


def main(arguments):
    """Print the figures. arguments: CONFIG.yaml [key=value ...]."""
    cfg, _, overrides = load(arguments)
    attempts = cfg.eval.verify_iters
    env = make_env(cfg.env, attempts)
    metrics = list(dict.fromkeys(chain(*[metrics for _, _, metrics in env.reports])))
    policy = Policy(cfg.model, cfg.lora)
    for variant in cfg.eval.variants:
        records = played(policy, cfg, variant, 1)
        print(f"bare, {variant}: {in_format(records, env.answer_key):.1%} in the task's format")
        print("    such as", repr(records[0]["turns"][0].text))
    if cfg.env["name"] == "gp":
        seeds = evaluation_seeds(cfg.eval.seed + TUNING, HANDS)
        for rule in gp.RULES:
            solved = puzzles_solved(policy, make_env(cfg.env, 1, rule=rule, image_size=None), seeds)
            print(f"bare, plain words, hands of rule {rule}: {solved:.1%}", flush=True)
    elif not cfg.env.get("image_size"):
        for rule in virl.RULES:
            known, turns = steps_known(policy, rule, cfg.eval.temperatures[0])
            print(f"bare, plain words, {rule} steps: {known:.1%}, turns {turns:.1%}", flush=True)
    arm = Path(cfg.run.dir) / arm_name("sft", overrides)
    if not checkpoints(arm):
        raise UserError(f"{arm} has no checkpoints: run sft.py with the same overrides first")
    for _, path in checkpoints(arm):
        policy.load(path, value_head=False)
        records = played(policy, cfg, "ID", attempts)
        describe(f"{path.name}, ID", records, metrics)
        knows = cfg.env["name"] != "gp" or share(records, "solved") >= LEAST
        if categories(records).get("illegal", 0) <= ILLEGAL and knows:
            break
    for variant in list(cfg.eval.variants)[1:]:
        describe(f"Init = {path.name}, {variant}", played(policy, cfg, variant, attempts), metrics)


if __name__ == "__main__":
    run_main(main)
