"""What every loader asks of the weights in a checkpoint: that they can be read, and that none is missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from enc2gen.encoders.safe_weights import refuse_pickles
from enc2gen.errors import CheckpointError, Enc2genError, first_line


@contextmanager
def reading_weights(name: str, owner: str) -> Iterator[None]:
    """Around `from_pretrained`: whatever it raises becomes `CheckpointError`; errors of ours pass; no pickle is opened.

    Args:
        name: of the checkpoint, for the message.
        owner: whose weights they are: "encoder", "LLM", "model".
    """
    refuse_pickles(name)
    try:
        yield
    except Enc2genError:
        raise
    except Exception as error:  # transformers, safetensors and tokenizers raise whatever they like
        raise CheckpointError(
            f"the {owner}'s weights cannot be read ({type(error).__name__}: {first_line(error)})",
            where=name,
            remedy=f"download the checkpoint again; it must hold safetensors weights of this very {owner}",
        ) from error


def check_complete(missing: Iterable[str], name: str, owner: str, *, otherwise: str) -> None:
    """Raise `CheckpointError` if tensors are `missing`; `otherwise` says what random ones in their place would do."""
    if names := sorted(missing):
        raise CheckpointError(
            f"the checkpoint lacks {len(names)} of the {owner}'s tensors, for example {names[0]}",
            where=name,
            remedy=f"use a complete checkpoint of this {owner}; random weights {otherwise}",
        )
