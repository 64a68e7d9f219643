"""What a backbone reads: texts, some of whose parts carry loss, and perhaps a picture."""
from typing import NamedTuple

SPECIAL = {"bos": "<|begin_of_text|>", "user": "<|user|>", "assistant": "<|assistant|>",
           "eos": "<|end|>", "image": "<|image|>", "pad": "<|pad|>"}


class Document(NamedTuple):
    """Parts follow one another; what stands before a part without loss is read all the same."""
    parts: list  # of (text, whether it carries loss), special tokens included
    image: object = None  # PIL image
    probe: list = None  # what a corpus's Probe must say of the image

    @property
    def text(self):
        return "".join(text for text, _ in self.parts)


class Exchange(NamedTuple):
    """What somebody asks, and the reply."""
    request: str
    reply: str
    learned: bool = True  # whether the reply carries loss


def prose(*parts):
    """A Document that is no conversation, of (text, whether it carries loss)."""
    return Document([(SPECIAL["bos"], False), *parts])


def chat(exchanges, image=None, probe=None):
    """A conversation as the chat template has it; the image belongs to the first request."""
    parts = [(SPECIAL["bos"], False)]
    shown = SPECIAL["image"] if image is not None else ""
    for exchange in exchanges:
        parts.append((SPECIAL["user"] + shown + exchange.request + SPECIAL["assistant"], False))
        parts.append((exchange.reply + SPECIAL["eos"], exchange.learned))
        shown = ""
    return Document(parts, image, probe)
