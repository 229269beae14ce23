"""What trimming a vocabulary saves, and that it costs nothing: one trained generator, before and after.

    enc2gen run recipes/quickstart.yaml --output runs/untrimmed -s encoder.trim_vocabulary=false   (hours on a laptop)
    python benchmarks/trimming.py runs/untrimmed/model --data runs/untrimmed/data

trims the generator to the run's text with `trim_model`, and measures both in processes of their own:
parameters, size on disk, peak memory, tokens per second in training and in writing, chrF++ on the first test examples
of each language, and how many outputs are the same. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from enc2gen import Generator
from enc2gen.data.batching import evaluation_batches
from enc2gen.evaluation.metrics import METRICS
from enc2gen.experiments.encoding import encode_pair
from enc2gen.experiments.prepare import PreparedData
from enc2gen.generation.generator import DecodingConfig
from enc2gen.models.surgery import load_for_surgery, trim_model
from enc2gen.models.token_loss import cross_entropy
from enc2gen.tokenization.tokenizer import TextCodec


def measure(folder: Path, data: PreparedData, limit: int, steps: int) -> dict[str, Any]:
    """Figures of one generator; meant for a process of its own, since peak memory is the process's."""
    generator = Generator.from_pretrained(str(folder), device="cpu")
    model = generator.model
    rows: dict[str, list[Any]] = {}
    for row in data.examples("test"):
        rows.setdefault(row["target_language"], []).append(row)
    result: dict[str, Any] = {
        "parameters": model.num_parameters(),
        "vocabulary": model.config.vocab_size,
        "megabytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6,
        "outputs": {},
        "chrf++": {},
    }
    seconds, written = 0.0, 0
    for language, found in sorted(rows.items()):
        examples = found[:limit]
        start = time.perf_counter()
        outputs = generator.generate(
            [row["source"] for row in examples],
            target_language=language,
            source_language=examples[0]["source_language"],
            config=DecodingConfig(num_beams=4),
        )
        seconds += time.perf_counter() - start
        written += sum(len(ids) + 1 for ids in generator.codec.encode_texts(outputs))
        references = [list(row["references"] or [row["target"]]) for row in examples]
        score = METRICS.get("chrf++").score(outputs, references, language=language)
        result["outputs"][language], result["chrf++"][language] = outputs, score.value if score else None
    result["written tokens/s"] = written / seconds
    result["peak memory, writing (MB)"] = peak()
    result["training tokens/s"] = training_speed(generator, data, steps)
    result["peak memory, training (MB)"] = peak()
    return result


def peak() -> float:
    """Largest resident set of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def training_speed(generator: Generator, data: PreparedData, steps: int) -> float:
    """Source and target tokens per second of AdamW updates with about 1,000 tokens each, bf16 autocast."""
    model = generator.model.train()
    codec: TextCodec = generator.codec
    examples = [encode_pair(codec, data.examples("train")[index]) for index in range(400)]
    batches = evaluation_batches(examples, codec.pad_id, 1024)[-steps - 1 :]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    start, tokens = 0.0, 0
    for number, batch in enumerate(batches):
        if number == 1:  # the first update also allocates the optimiser's state
            start = time.perf_counter()
        inputs = batch.as_model_inputs()
        labels = inputs.pop("labels")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(**inputs, use_cache=False).logits
        loss = cross_entropy(logits, labels).loss / batch.num_target_tokens
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        tokens += batch.num_tokens if number else 0
    return tokens / (time.perf_counter() - start)


def in_process(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, str(folder), "--data", str(arguments.data), "--measure"]
    command += ["--limit", str(arguments.limit), "--steps", str(arguments.steps)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Trim, measure both, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="trained generator with its whole vocabulary")
    parser.add_argument("--data", type=Path, required=True, help="data/ of its run")
    parser.add_argument("--limit", type=int, default=100, help="test examples per language")
    parser.add_argument("--steps", type=int, default=5, help="timed training updates")
    parser.add_argument("--measure", action="store_true", help="only measure MODEL and print JSON")
    arguments = parser.parse_args()
    data = PreparedData(arguments.data)
    if arguments.measure:
        print(json.dumps(measure(arguments.model, data, arguments.limit, arguments.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load_for_surgery(arguments.model)
        splits = ("train", "dev", "test")  # what is to be read must be in the corpus, or it is split otherwise
        texts = [row[side] for split in splits for row in data.examples(split) for side in ("source", "target")]
        start = time.perf_counter()
        change = trim_model(model, tokenizer, texts)
        seconds = time.perf_counter() - start
        model.save_pretrained(folder)
        change.tokenizer.save_pretrained(folder)
        del model
        before, after = in_process(arguments.model, arguments), in_process(Path(folder), arguments)
    print(f"trimmed in {seconds:.0f} s\n\n| | before | after |\n| --- | --- | --- |")
    for name in before:
        if name == "outputs":
            continue
        if isinstance(before[name], dict):
            for tag in before[name]:
                print(f"| {name} {tag} | {before[name][tag]:.2f} | {after[name][tag]:.2f} |")
        else:
            print(f"| {name} | {before[name]:,.0f} | {after[name]:,.0f} |")
    for tag, outputs in before["outputs"].items():
        same = sum(a == b for a, b in zip(outputs, after["outputs"][tag], strict=True))
        print(f"\n{tag}: {same} of {len(outputs)} outputs are the same")


if __name__ == "__main__":
    main()
