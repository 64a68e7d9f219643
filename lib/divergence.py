"""How far a policy has gone from where it began: KL divergence in nats per answer."""
from itertools import chain

from lib.batching import sequences_of
from lib.ppo import answer_logprobs


def divergences(records, policy_at, checkpoint, start, micro_tokens):
    """What answers sampled at T = 1 tell of KL(checkpoint || start).

    Args:
        records: of rollout.evaluate, of answers that the checkpoint's policy sampled at T = 1.
        policy_at: function of a checkpoint that returns its policy; there may be only one, whose
            weights change.
        checkpoint, start: paths. micro_tokens: as ppo.micro_tokens.
    Returns: per record (sum of log pi - log start over its answers' tokens, answers). The ratio of
        the sums is an unbiased estimate of the divergence; a single one may be below 0.
    """
    turns = list(chain(*[record["turns"] for record in records]))
    packed = sequences_of(turns, 1 + max(turn.slot for turn in turns))
    own = answer_logprobs(policy_at(checkpoint), packed, micro_tokens, 1.0)
    other = answer_logprobs(policy_at(start), packed, micro_tokens, 1.0)
    gaps = iter([(here - there).sum().item() for here, there in zip(own, other)])
    found = []
    for record in records:
        of_record = [next(gaps) for _ in record["turns"]]
        found.append((sum(of_record), len(of_record)))
    return found
