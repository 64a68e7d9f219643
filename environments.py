"""What an environment is, which ones there are, and how one is made of the YAML. No torch here.

Environments know no model and rollout.py alone joins the two, so what reads results without a model
(report.py) can show again what an episode showed: see `observations`.
"""
from typing import ClassVar, Protocol

import gp
import virl
from lib.checks import check_settings
from lib.errors import UserError

ENVIRONMENTS = {"gp": gp.GeneralPoints, "virl": virl.Navigation}  # by env.name in the YAML


class Environment(Protocol):
    """What an environment provides; a line in ENVIRONMENTS adds it. It need not inherit from this.

    An episode is one problem: one or several positions, each of which takes up to `verify_iters`
    answers. A right answer moves on to the next position (and may empty the conversation); a wrong
    one stays in the conversation, followed by the verifier's text. The seed given to `reset` and
    the answers given to `step` determine all that is observed: a continued run replays its answers.

    An observation is {"messages": chat turns, "image": PIL image or None}:
        messages: [{"role": "user" or "assistant", "content": text}, ..], the user's last; a list
            that later steps leave as it is. With an image, the first content is
            [{"type": "image"}, {"type": "text", "text": text}].
        image: one object as long as the conversation goes on, so that it is encoded once. Either
            all observations of an environment have one or none has.

    Attributes:
        SETTINGS: {name: check of lib/checks.py} of what the YAML's `env` section may set beside
            `name`: the constructor's keyword arguments, with defaults; it checks them by
            check_settings. `split` is one of them: its values are the keys of eval.splits.
            eval.variants may change each of them.
        answer_key: a text in every answer, such as '"formula"': tokens before the one that
            completes it weigh ppo.prefix_weight in the PPO ratio. "": all weigh 1.
        reports: [(name, title, metrics), ..], the tables of an evaluation; metrics are those of
            `counts`. The last metric of the first report is the one drawn over compute.
        references: names of policies without a model that eval.py shows below the arms, or ().
        playing: may be absent; text for what is played whatever the split is called, such as
            "routes VLN_mini/route_infos.json", or None: the split.
    """
    SETTINGS: ClassVar[dict]
    answer_key: str
    reports: list
    references: tuple

    def __init__(self, verify_iters, **settings):
        """Raises: ValueError that starts with the setting's name, for one out of range."""

    def reset(self, seed, progress=0.0):
        """Start the episode of a seed, `progress` in [0, 1) of the way along its positions.

        Returns: (observation, info).
        """

    def step(self, answer):
        """Grade one whole answer. Never raises for a text, whatever it holds.

        Returns: (observation, reward in the paper's points, terminated: the episode is solved,
        truncated: attempts are exhausted, info = {
            category: name of the grade, whose shares rl.py logs,
            correct: this answer was right,
            recognized: it reports the right observation (cards, landmarks), whatever its action,
            reported: it reports an observation at all; may be absent,
            action: type of the right action here, for accuracies "first_<action>", or None,
            attempt: 1.. at this position,
            feedback: the verifier's text, "" after a right answer,
            cluster: text; episodes that share it are resampled together, as not independent,
            positions: of the whole episode, for the metric of this name; may be absent}).
        """

    def expert(self):
        """An answer that earns the full reward here: what SFT learns."""

    def mistake(self):
        """A plausible wrong answer here, for SFT after mistakes (sft.mistakes)."""

    def reference(self, name):
        """The answer here of the reference policy `name`, one of `references`."""


def make_env(settings, verify_iters, **changes):
    """The environment that the YAML's `env` section names, with `changes` of its keys.

    Args: settings: the `env` section; verify_iters: answers allowed per position.
    Raises: UserError for an unknown environment, an unknown setting or one out of range.
    """
    settings = {**settings, **changes}
    name = settings.pop("name", None)
    if not isinstance(name, str) or name not in ENVIRONMENTS:
        raise UserError(f"env.name: {name!r} is none of {', '.join(ENVIRONMENTS)}")
    environment = ENVIRONMENTS[name]
    try:
        check_settings(settings, environment.SETTINGS, prefix="env.")
    except ValueError as error:
        raise UserError(str(error)) from None
    try:
        return environment(**settings, verify_iters=verify_iters)
    except ValueError as error:
        raise UserError(f"env.{error}") from None


def observations(env, seed):
    """What is to be seen at each position of a seed's episode, before any answer there.

    Returns: list of observations, those on the way of one who always gives the expert's answer.
    """
    observation, _ = env.reset(seed)
    seen, done = [], False
    while not done:
        seen.append(observation)
        observation, _, terminated, truncated, _ = env.step(env.expert())
        done = terminated or truncated
    return seen
