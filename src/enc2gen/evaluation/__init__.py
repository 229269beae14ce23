"""EVALUATION: scores with intervals and signatures, and how much a generator uses its source."""

from enc2gen.evaluation.metrics import METRICS, Metric
from enc2gen.evaluation.significance import PairedDifference, Score, Statistics, paired_bootstrap
from enc2gen.evaluation.source_use import SourceUse

__all__ = ["METRICS", "Metric", "PairedDifference", "Score", "SourceUse", "Statistics", "paired_bootstrap"]
