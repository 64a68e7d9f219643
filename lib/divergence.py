"""How far a policy has gone from where it began: KL divergence in nats per answer."""
from itertools import chain

from lib.batching import sequences_of
from lib.ppo import answer_logprobs


def divergences(records, policy_at, start, checkpoint, micro_tokens):
    """What answers that the start sampled at T = 1 tell of KL(start || checkpoint).

    Args:
        records: of rollout.evaluate, of those answers.
        policy_at: function of a checkpoint that returns its policy; there may be only one, whose
            weights change.
        start, checkpoint: paths. micro_tokens: as ppo.micro_tokens.
    Returns: per record (sum of log start - log checkpoint over its answers' tokens, answers). The
        ratio of the sums is an unbiased estimate; a single one may be below 0.
    Source: the direction is that of arXiv 2509.04259 (RL's Razor). All checkpoints score the same
        answers, so that what differs between them is not the luck of sampling.
    """
    turns = list(chain(*[record["turns"] for record in records]))
    packed = sequences_of(turns, 1 + max(turn.slot for turn in turns))
    before = answer_logprobs(policy_at(start), packed, micro_tokens, 1.0)
    now = answer_logprobs(policy_at(checkpoint), packed, micro_tokens, 1.0)
    gaps = iter([(there - here).sum().item() for there, here in zip(before, now)])
    found = []
    for record in records:
        of_record = [next(gaps) for _ in record["turns"]]
        found.append((sum(of_record), len(of_record)))
    return found
