"""What decoding starts from: the target language's token, one for all sources or one for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from enc2gen.errors import LanguageError

if TYPE_CHECKING:
    from enc2gen.models.swcm.modeling import SwcmForConditionalGeneration


def decoder_start(
    model: SwcmForConditionalGeneration,
    source: Tensor | None,
    target_language: str | Sequence[str] | None,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """The arguments of `generate` with the start token of `target_language`, where one is given.

    Args:
        source: ids `[B, S]`.
        target_language: one tag for the batch, or one per source.

    Raises:
        LanguageError: the model has no such language, another number of languages than of sources, or no start token
            is known: none given, and no default in `arguments` or the model's own generation configuration.
    """
    if target_language is not None:
        if isinstance(target_language, str):
            return arguments | {"decoder_start_token_id": model.language_id(target_language)}
        ids = [model.language_id(tag) for tag in target_language]
        if source is not None and len(ids) != len(source):
            raise LanguageError(
                f"{len(ids)} target languages for {len(source)} sources",
                where="target_language",
                remedy="give one language, or one per source",
            )
        return arguments | {"decoder_start_token_id": ids}
    given = (arguments.get("decoder_start_token_id"), arguments.get("decoder_input_ids"))
    # transformers takes from the model's own configuration what the one that is given leaves open.
    settings = (arguments.get("generation_config"), model.generation_config)
    defaults = (getattr(config, "decoder_start_token_id", None) for config in settings)
    if all(value is None for value in (*given, *defaults)):
        languages = ", ".join(sorted(model.config.language_ids))
        raise LanguageError(
            "no target language given" if languages else "no language and no start token are known",
            where="target_language",
            remedy=f"pass target_language, one of: {languages}" if languages else "pass decoder_start_token_id",
        )
    return arguments
