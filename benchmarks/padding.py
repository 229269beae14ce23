"""Share of padding in the trainer's batches: `python -m benchmarks.padding FILE.jsonl.gz ... [--length-noise 0.1]`.

Each file is a stream of its own: pairs (src, tgt), summaries (document, summary), or texts (text, restored as it is).
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
from pathlib import Path

from enc2gen.data.batching import BatchingConfig, BatchStream
from enc2gen.data.mixture import MixtureSampler
from enc2gen.encoders.loading import load_tokenizer
from enc2gen.tokenization.examples import EncodedExample

FIELDS = (("src", "tgt"), ("document", "summary"), ("text", "text"))


def examples(path: Path, tokenizer: str, longest: int) -> list[EncodedExample]:
    """The file's examples, cut to `longest` tokens."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    source, target = next(fields for fields in FIELDS if set(fields) <= rows[0].keys())
    encode = load_tokenizer(tokenizer)
    sources, targets = (
        encode([row[name] for row in rows], truncation=True, max_length=longest)["input_ids"]
        for name in (source, target)
    )
    return [EncodedExample(tuple(a), tuple(b), tuple(b)) for a, b in zip(sources, targets, strict=True)]


def main() -> None:
    """Print the share of padding in batches of the default configuration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokenizer", default="embedded:multilingual-e5-small")
    parser.add_argument("--length-noise", type=float, default=BatchingConfig().length_noise)
    parser.add_argument("--longest", type=int, default=256, help="tokens of a source or target")
    parser.add_argument("--batches", type=int, default=300)
    arguments = parser.parse_args()
    streams = {str(path): examples(path, arguments.tokenizer, arguments.longest) for path in arguments.files}
    sampler = MixtureSampler({name: len(items) for name, items in streams.items()})
    config = BatchingConfig(length_noise=arguments.length_noise)
    stream = BatchStream(lambda name, item, _: streams[name][item], sampler, 1, config, 0, {})
    real = padded = 0
    for batch in itertools.islice(stream, arguments.batches):
        real += batch.num_tokens
        padded += batch.input_ids.numel() + batch.labels.numel()
    print(f"padding: {1 - real / padded:.1%} of {padded:,} positions in {arguments.batches} batches")


if __name__ == "__main__":
    main()
