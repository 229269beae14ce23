"""What a generator hands out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Output:
    """One output of one source.

    Attributes:
        text: what was written.
        score: of beam and greedy search, the log-probability in nats divided by n^length_penalty (n tokens, the end
            counted), with the coverage penalty of beams; of samples, the log-probability; of MBR, the mean chrF (0 to
            100) against the other samples.
        ended: whether the model ended it; False where it was cut at the longest length.
        unmet: required terms that are not in it.
    """

    text: str
    score: float = 0.0
    ended: bool = True
    unmet: tuple[str, ...] = ()
