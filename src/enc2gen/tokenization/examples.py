"""What a codec makes of a pair of texts: the ids of one example."""

from __future__ import annotations

from dataclasses import dataclass

from enc2gen.errors import DataError

# The label that cross-entropy ignores: torch's and transformers' default.
IGNORED_LABEL = -100


@dataclass(frozen=True)
class EncodedExample:
    """Ids of one example: `decoder_input_ids[i]` is what the decoder reads when it should write `labels[i]`.

    Raises:
        DataError: empty source or target, or decoder inputs and labels of different length.
    """

    input_ids: tuple[int, ...]
    decoder_input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.input_ids or not self.labels:
            raise DataError(f"an example has {len(self.input_ids)} source and {len(self.labels)} target tokens")
        if len(self.decoder_input_ids) != len(self.labels):
            raise DataError(
                f"an example has {len(self.decoder_input_ids)} decoder inputs for {len(self.labels)} labels"
            )

    @property
    def source_length(self) -> int:
        """Source tokens."""
        return len(self.input_ids)

    @property
    def target_length(self) -> int:
        """Target tokens."""
        return len(self.labels)
