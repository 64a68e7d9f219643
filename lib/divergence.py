"""How far a policy has gone from Init: KL(Init || policy) in nats per answer."""
from itertools import chain

from lib.batching import sequences_of
from lib.ppo import answer_logprobs


def log_ratios(records, policy_at, init, checkpoint, micro_tokens):
    """What Init's own answers tell of KL(Init || checkpoint).

    Args:
        records: of rollout.evaluate, of answers that Init sampled at T = 1.
        policy_at: function of a checkpoint that returns its policy; there may be only one, whose
            weights change.
        init, checkpoint: paths. micro_tokens: as ppo.micro_tokens.
    Returns: per record (sum of log Init - log checkpoint over its answers' tokens, answers). The
        ratio of the sums estimates the divergence: without bias in float32 where an episode has one
        answer; a walk ends here at its first wrong answer, so that its late positions count less. A
        single log-ratio may be below 0.
    Source: arXiv 2509.04259 (RL's Razor), whose direction this is. All checkpoints score the same
        answers, so that what differs between them is not the luck of sampling.
    """
    turns = list(chain(*[record["turns"] for record in records]))
    packed = sequences_of(turns, 1 + max(turn.slot for turn in turns))
    of_init = answer_logprobs(policy_at(init), packed, micro_tokens, 1.0)
    of_checkpoint = answer_logprobs(policy_at(checkpoint), packed, micro_tokens, 1.0)
    gaps = iter([(a - b).sum().item() for a, b in zip(of_init, of_checkpoint)])
    found = []
    for record in records:
        of_record = [next(gaps) for _ in record["turns"]]
        found.append((sum(of_record), len(of_record)))
    return found
