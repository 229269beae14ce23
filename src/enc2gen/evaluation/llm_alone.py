"""The LLM without a bridge: it reads the text itself and is asked for the label. What a bridge adds is above this.

With a chat template the model is asked in a user turn and the answer is the turn that follows, ended by EOS:

    Give the topic of the text. Answer with one of: sports, travel, politics.

    Text: {text}

Without one it continues a text, and a label ends with its line:

    Give the topic of the text. Answer with one of: sports, travel, politics.

    Text: {text}
    Answer: sports
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from enc2gen.errors import ConfigError, ModelError
from enc2gen.evaluation.label_scoring import Classification, ReadSource, TreeScorer
from enc2gen.evaluation.significance import Floats
from enc2gen.generation.generator import pad_rows
from enc2gen.tokenization.tokenizer import cut_text, encode_pieces, fast_backend, protect_special_tokens

TEXT, LABELS = "{text}", "{labels}"
INSTRUCTION = "Give the topic of the text. Answer with one of: {labels}.\n\nText: {text}"
"""Our wording. `{labels}` are the labels, parted by commas."""
_ANSWER = "\nAnswer:"
_MESSAGE = "\ue000"  # stands for the user's message in a rendered chat template: a private character, in no text
_CONTENT_FREE = "N/A"  # arXiv 2102.09690, section 5


class LlmAlone(TreeScorer[list[int]]):
    """How likely an LLM finds each label after reading the text itself: :meth:`log_likelihoods`.

    Args:
        llm: a causal language model; it is put into evaluation mode.
        tokenizer: its tokenizer. It is set up to read text that spells a special token as plain text.
        labels: what it may answer.
        instruction: the message, with `{text}` and, if wanted, `{labels}`.
        chat: whether to ask through the tokenizer's chat template; None: if it has one.
        max_text_length: most tokens of a text; longer ones are cut at the end (our choice of 1,024).

    Attributes:
        truncated: number of texts that were cut.

    Raises:
        ConfigError: no `{text}` in the instruction; no label, an empty one, or two with the same tokens.
        ModelError: no EOS token; `chat` without a chat template, or one that does not show the user's message.
    """

    def __init__(
        self,
        llm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        *,
        instruction: str = INSTRUCTION,
        chat: bool | None = None,
        max_text_length: int = 1024,
    ) -> None:
        if instruction.count(TEXT) != 1:
            raise ConfigError(
                f"{instruction!r} does not hold {TEXT} exactly once", where="instruction", remedy='"Text: {text}", say'
            )
        if not all(label.strip() for label in labels):
            raise ConfigError("a label is empty", where="labels", remedy="give every label a name")
        self._backend, self._tokenizer = protect_special_tokens(tokenizer), tokenizer
        self._max_text_length, self.truncated = max_text_length, 0
        self.chat = bool(tokenizer.chat_template) if chat is None else chat
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise ModelError("the tokenizer has no EOS token", where=tokenizer.name_or_path or "llm")
        self._pad: int = pad
        before, after = instruction.split(TEXT)
        self._before, self._after = (part.replace(LABELS, ", ".join(labels)) for part in (before, after))
        self._head, self._tail = self._chat_turns() if self.chat else (_start(tokenizer), [])
        super().__init__(llm.eval(), labels, [self._label_ids(label) for label in labels])

    def _chat_turns(self) -> tuple[list[int], list[int]]:
        """What the chat template puts before and after the user's message."""
        where = self._tokenizer.name_or_path or "llm"
        if not self._tokenizer.chat_template:
            raise ModelError("the tokenizer has no chat template", where=where, remedy="leave chat out")
        messages = [{"role": "user", "content": _MESSAGE}]
        rendered = str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        if rendered.count(_MESSAGE) != 1:
            raise ModelError("the chat template does not show the user's message once", where=where)
        head, tail = rendered.split(_MESSAGE)
        return self._template_ids(head), self._template_ids(tail)

    def _template_ids(self, part: str) -> list[int]:
        """Ids of text in which special tokens are meant as such."""
        ids = self._tokenizer(part, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        return [int(i) for i in ids]

    def _label_ids(self, label: str) -> list[int]:
        if self.chat:
            return [*encode_pieces(self._backend, [label])[0], int(self._tokenizer.eos_token_id)]
        question, answered = encode_pieces(self._backend, [_ANSWER, f"{_ANSWER} {label}\n"])
        if answered[: len(question)] == question:
            return answered[len(question) :]
        return encode_pieces(self._backend, [f" {label}\n"])[0]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        messages = [self._before + self._shortened(text) + self._after for text in texts]
        if self.chat:
            return [[*self._head, *ids, *self._tail] for ids in encode_pieces(self._backend, messages)]
        return [[*self._head, *ids] for ids in encode_pieces(self._backend, [m + _ANSWER for m in messages])]

    def _shortened(self, text: str) -> str:
        shortened, cut = cut_text(self._backend, text, self._max_text_length)
        self.truncated += cut
        return shortened

    def _length(self, source: list[int]) -> int:
        return len(source)

    def _read(self, sources: Sequence[list[int]]) -> ReadSource:
        ids, mask = pad_rows(sources, self._pad, self.llm.device, left=True)
        output = self.llm(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        return ReadSource(output.past_key_values, mask, output.logits[:, -1])

    def classify(
        self,
        texts: Sequence[str],
        *,
        calibrate: bool = False,
        batch_size: int = 32,
        on_batch: Callable[[int], None] | None = None,
    ) -> Classification:
        """Label every text.

        Args:
            calibrate: divide by the probability of each label behind the text "N/A", which removes the model's
                preference for some labels whatever the text (contextual calibration, arXiv 2102.09690).
            batch_size: texts that are read at once, of like lengths.
            on_batch: called with the number of texts finished so far.
        """
        scores: Floats = self.log_likelihoods(texts, batch_size=batch_size, on_batch=on_batch)
        if calibrate:
            scores = scores - self.log_likelihoods([_CONTENT_FREE])
        return Classification.likeliest(self.labels, np.asarray(scores))


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before any text: BOS, in most LLMs that have one."""
    backend: Tokenizer = fast_backend(tokenizer)
    encoding = backend.encode("a", add_special_tokens=True)
    added = encoding.special_tokens_mask
    return encoding.ids[: added.index(0) if 0 in added else 0]
