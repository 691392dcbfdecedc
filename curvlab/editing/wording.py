"""How requests are put to the model by editors that look at them without training on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from curvlab.capture import Batch
from curvlab.data.edits import Request
from curvlab.data.text import PLAIN
from curvlab.editing.training import Training


@dataclass(frozen=True)
class Wording:
    """Prompts and targets as text.

    Attributes:
        template: the prompt a request is asked in; `curvlab.data.text.QA` is the paper's QA context.
        ending: text put after each target, such as the full stop of the model's own documents.
        end: the end-of-text token follows.
        batch_size: requests of one forward pass; it changes the time and nothing else.
    """

    template: str = PLAIN
    ending: str = ""
    end: bool = True
    batch_size: int = 32

    def __post_init__(self) -> None:
        self.encoding()

    def encoding(self) -> Training:
        """The part of `Training` that makes batches of requests."""
        return Training(template=self.template, ending=self.ending, end=self.end, batch_size=self.batch_size)

    def batches(self, tokenizer: Any, requests: Sequence[Request]) -> list[Batch]:
        """The requests in their order, the loss on targets and ends."""
        return self.encoding().encode(tokenizer, requests, batch_size=self.batch_size)
