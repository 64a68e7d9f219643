"""Observations and answers as token ids, by the model's own chat template."""
from jinja2 import TemplateError

from lib.answers import THOUGHT
from lib.batching import Sequence
from lib.errors import UserError, one_line

# in Llama's template, which would put today's: a run continued tomorrow would read other prompts
DATE = "26 Jul 2024"
QUESTION, ANSWER = "a question", "an answer"


def between(prompt, answer, whole):
    """What stands between a prompt and the answer to it, "" if they are not both in the whole."""
    if not whole.startswith(prompt) or answer not in whole:
        return ""
    return whole[len(prompt):whole.index(answer)]


class PromptEncoder:
    """Args: tokenizer: of the model; family: as in lib/families.py; thinking: cfg.model.thinking.

    Attributes: opened: what of an answer the template writes itself: "<think>" or nothing;
    in_parts: the template would drop a message that is a plain string (SmolVLM's); lead: what it
    writes between the start of the model's turn and an answer (SmolVLM's: a space).
    Raises: UserError if the chat template refuses a conversation or leaves out what is said.
    """

    def __init__(self, tokenizer, family, thinking):
        self.tokenizer = tokenizer
        self.family = family
        self.thinking = thinking
        added = tokenizer.added_tokens_decoder.values()
        self.special_tokens = [token.content for token in added if token.special]
        question = {"role": "user", "content": QUESTION}
        self.in_parts = False
        self.in_parts = QUESTION not in self._text([question])
        prompt = self._text([question])
        whole = self._text([question, {"role": "assistant", "content": ANSWER}])
        for role, said, written in (("user", QUESTION, prompt), ("assistant", ANSWER, whole)):
            if said not in written:  # it would be trained on prompts without the task
                raise UserError(f"model.path: the model's chat template leaves out what the {role} "
                                "says, as if it knew no such role; name another model")
        self.lead = between(prompt, ANSWER, whole)
        self.opened = THOUGHT if prompt.rstrip().endswith(THOUGHT) else ""

    def encode(self, observations):
        """Prompts of observations {"messages", "image"}, as Sequences without spans.

        The template writes the BOS, the tokenizer adds none. What a message spells is text: it
        never becomes a special token. Earlier answers are among the messages and get ids anew.
        """
        ids = self._ids([o["messages"] for o in observations])
        prompts = []
        for o, prompt in zip(observations, ids):
            image = o["image"]
            prompts.append(Sequence(self.family.expand_image_tokens(prompt, image), [], image))
        return prompts

    def encode_answers(self, texts):
        """Answer ids with the end-of-turn token, as the model should write them."""
        led = [self.lead + text for text in texts]
        answers = self.tokenizer(led, add_special_tokens=False)["input_ids"]
        return [ids + [self.tokenizer.eos_token_id] for ids in answers]

    def decode(self, ids):
        """Text of token ids, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).removeprefix(self.lead)

    def _ids(self, conversations):
        """Token ids of lists of messages, up to where the model's next turn begins."""
        texts = [self._text(messages) for messages in conversations]
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def _text(self, messages):
        """A conversation as the chat template writes it; one that knows no thinking ignores that.

        A system prompt that the template adds by default stays: the model learned with it.
        """
        plain = []
        for message in messages:
            content = self._plain(message["content"])
            if self.in_parts and isinstance(content, str):
                content = [{"type": "text", "text": content}]
            plain.append({**message, "content": content})
        try:
            return self.tokenizer.apply_chat_template(
                plain, tokenize=False, add_generation_prompt=True, date_string=DATE,
                enable_thinking=self.thinking)
        except (TemplateError, TypeError) as error:  # the latter: it joins text and a list
            raise UserError("model.path: the model's chat template refuses a conversation: "
                            f"{one_line(error)}") from None

    def _plain(self, content):
        """Message content with the special tokens that it spells broken up: <|image|> in an answer
        is no second image."""
        if isinstance(content, list):
            return [{**part, "text": self._plain(part["text"])} if "text" in part else part
                    for part in content]
        for token in self.special_tokens:
            content = content.replace(token, f"{token[0]} {token[1:]}")
        return content
