"""What a trained language model knows of its world."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from curvlab.data.text import IGNORE, PLAIN, QA, encode_pairs
from curvlab.data.world import World
from curvlab.data.world_real import RELATIONS as REAL
from curvlab.data.world_tasks import Item
from curvlab.evaluation.capability import perplexity


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: World) -> dict[str, float]:
    """Exact-match shares on all facts and tasks, and the perplexity of the held-out stories.

    Facts from a data folder are counted apart (`real`): their phrasings have little in common, so that held-out ones
    are beyond a model that small.
    """
    groups: dict[str, list[Item]] = {}
    for fact in world.facts:
        origin = "real_" if fact.relation in REAL else ""
        for kind, prompts in (("trained", fact.train_prompts), ("held_out", fact.held_out_prompts)):
            groups.setdefault(f"recall_{origin}{kind}", []).extend(Item(prompt, fact.answer) for prompt in prompts)
    measured = {name: exact_share(model, tokenizer, items) for name, items in groups.items()}
    for name in ("recall_trained", "recall_held_out"):
        measured[f"{name}_qa"] = exact_share(model, tokenizer, groups[name], template=QA)
    for task, items in world.tasks.items():
        measured[f"task_{task}"] = exact_share(model, tokenizer, items)
    return measured | {"perplexity": perplexity(model, tokenizer, world.stories, batch_size=16).mean}


@torch.no_grad()
def exact_share(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, items: list[Item], *, template: str = PLAIN
) -> float:
    """Share of items of which greedy decoding gives the whole answer and its full stop.

    Greedy decoding follows the answer exactly where the most likely token is right at each of its positions, so that
    one forward pass decides.
    """
    right = 0
    pairs = sorted(((item.prompt, f"{item.answer}.") for item in items), key=lambda pair: len(pair[0]))
    for batch in encode_pairs(tokenizer, pairs, template=template, end=False, batch_size=64):
        guesses = model(**batch.inputs).logits.argmax(-1)
        right += int(((guesses == batch.targets) | (batch.targets == IGNORE)).all(1).sum())
    return right / len(items)
