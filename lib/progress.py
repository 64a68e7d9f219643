"""What a script says on stderr while it works: first what it is about to do, then how far it is."""
import sys
import time

from tqdm import tqdm

EVERY = 30  # seconds between two lines, where no terminal shows a bar


def announce(script, cfg, doing):
    """One line: what is trained or played, by which model, on what device.

    Args: script: "sft.py"; doing: the end of the line, as "-> runs/mini_gp_l/sft, from step 40".
    """
    settings = {name: cfg.env[name] for name in ("rule", "split") if name in cfg.env}
    if settings.get("split") == "train" or script == "eval.py":  # eval.splits says what is played
        settings.pop("split", None)
    told = ", ".join(f"{name} {value}" for name, value in settings.items())
    env = f"{cfg.env.get('name')} ({told})" if told else cfg.env.get("name")
    model = f"random {cfg.model.shape}" if cfg.model.random_init else cfg.model.path
    print(f"{script}: {env}, {model} on {cfg.model.device} {doing}", file=sys.stderr)


def warn_of_split(script, cfg):
    """A line more if training is not confined to the split that is made for it."""
    split = cfg.env.get("split", "train")
    if split != "train":
        print(f"{script}: env.split={split}, not train: training may meet what evaluations call "
              "unseen", file=sys.stderr)


def progress_bar(steps=None, **options):
    """tqdm's bar, or without a terminal (nohup, SLURM, a notebook) a line now and then.

    Args: steps: what to iterate over, if anything; options: tqdm's.
    """
    if sys.stderr.isatty():
        return tqdm(steps, **options)
    return Lines(steps, **options)


class Lines(tqdm):
    """A tqdm bar that prints a line every EVERY seconds, and one at the end."""

    def __init__(self, *args, **options):
        self.said_at = time.monotonic()
        self.said = None
        text = "{desc}: {n_fmt}/{total_fmt} {unit}s in {elapsed}, {remaining} left{postfix}"
        super().__init__(*args, **options, bar_format=text, mininterval=0, miniters=1)

    def display(self, msg=None, pos=None):
        """What tqdm calls whenever it would draw the bar."""
        if time.monotonic() - self.said_at >= EVERY:
            self.say()

    def say(self):
        self.said_at = time.monotonic()
        self.desc = self.desc.removesuffix(": ")  # set_description adds it, the constructor not
        line = str(self).removeprefix(": ")
        if line != self.said:
            print(line, file=sys.stderr)
        self.said = line

    def close(self):
        if not self.disable and self.initial < self.n == self.total:
            self.say()  # else it was stopped, and another line says how far it came
        self.leave = False
        super().close()
