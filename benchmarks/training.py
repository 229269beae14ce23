"""Training speed and memory: `enc2gen.training.Trainer` against transformers' `EncoderDecoderModel` + `Seq2SeqTrainer`.

Both train a model of equal shape (encoder, and a decoder of as many standard layers; one word embedding table that is
the output layer too) on the same batches in bf16 with AdamW. transformers by itself would keep two tables; here it is
given one, so that it is not charged for parameters that ours does not have.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measuring import Side, Turns, alternate, compare, environment, matrix_products, peak, synchronise
from benchmarks.workloads import build_model, codec_of, forward_operations, load_pairs

if TYPE_CHECKING:
    from enc2gen import SwcmForConditionalGeneration
    from enc2gen.tokenization.examples import EncodedExample

ENDLESS = 10**6
LARGE_PRODUCT = 5e8  # FLOP of a call that counts as a large product (our choice)


_DRAWN = 64  # batches drawn to choose from
_BATCHES = {"product": "batches of our own stream", "by-source": "batches by source length"}


def groups_of_examples(model: SwcmForConditionalGeneration, settings: Mapping[str, Any]) -> list[list[EncodedExample]]:
    """The batches of one turn, as examples of similar length: about `target_tokens` target tokens each."""
    from enc2gen.tokenization.examples import EncodedExample

    codec = codec_of(model)
    examples = []
    for source, target, language in settings["pairs"]:
        decoder_input_ids, labels = codec.encode_target(target, language)
        ids = codec.encode_source(source, None)
        examples.append(EncodedExample(tuple(ids), tuple(decoder_input_ids), tuple(labels)))
    longest = max(example.source_length + example.target_length for example in examples)
    cut = _by_source if settings["batches"] == "by-source" else _by_both_sides
    return cut(examples, max(2 * settings["target_tokens"], longest), settings["seed"])[: settings["steps"]]


def _by_source(examples: list[EncodedExample], budget: int, seed: int) -> list[list[EncodedExample]]:
    """Neighbours in the order of source lengths, as with transformers' `group_by_length`."""
    import random

    from enc2gen.data.batching import length_ordered

    examples.sort(key=lambda example: (example.target_length, example.source_length))
    cuts = length_ordered(examples, budget)
    random.Random(seed).shuffle(cuts)
    # the last of the batches cut may be small: the fullest are taken
    return sorted(([examples[index] for index in cut] for cut in cuts), key=_targets, reverse=True)


def _by_both_sides(examples: list[EncodedExample], budget: int, seed: int) -> list[list[EncodedExample]]:
    """The product's own batches, without those that are left over at the ends of its buffer."""
    from enc2gen.data.batching import BatchingConfig, BatchStream
    from enc2gen.data.mixture import MixtureSampler

    stream: Any = BatchStream(
        lambda _, item, __: examples[item],
        MixtureSampler({"pairs": len(examples)}),
        0,
        BatchingConfig(max_tokens=budget),
        seed,
        {},
        collate=lambda group, _: list(group),
    )
    groups: list[list[EncodedExample]] = list(itertools.islice(stream, _DRAWN))
    fullest = max(map(_targets, groups))
    return [group for group in groups if _targets(group) >= 0.8 * fullest]


def _targets(group: Sequence[EncodedExample]) -> int:
    return sum(example.target_length for example in group)


def padding_of(groups: Sequence[Sequence[EncodedExample]]) -> float:
    """Share of padding in padded batches of these examples."""
    real = padded = 0
    for group in groups:
        for lengths in ([e.source_length for e in group], [e.target_length for e in group]):
            real, padded = real + sum(lengths), padded + len(lengths) * max(lengths)
    return 1 - real / padded


class _Stream:
    """The same batches again and again, as the trainer reads them."""

    fingerprint = "benchmark"

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return itertools.cycle(self.batches)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None


class _Clock:
    """Turns of `steps` updates each, for both trainers' callbacks."""

    def __init__(self, turns: Turns, groups: Sequence[Sequence[EncodedExample]], figures: dict[str, Any]) -> None:
        self.turns, self.steps, self.figures = turns, len(groups), figures
        self.tokens = sum(e.source_length + e.target_length for group in groups for e in group)
        self.done, self.start, self.profiler = 0, 0.0, None

    def begin(self) -> None:
        """Wait for the next turn and start it."""
        if self.turns.next() == "profile":
            self.profiler = start_profiler()
        self.done, self.start = 0, time.perf_counter()

    def step(self) -> None:
        """Count an update; after the last of a turn report, and wait for the next."""
        self.done += 1
        if self.done < self.steps:
            return
        synchronise()
        seconds = time.perf_counter() - self.start
        profile = {} if self.profiler is None else profile_figures(self.profiler, seconds)
        self.profiler = None
        self.turns.report(seconds=seconds, tokens=self.tokens, **self.figures, **profile)
        self.begin()


def start_profiler() -> Any:
    """A running profiler of all operations, with the FLOP of products."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    import torch

    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    profiler = profile(activities=activities, record_shapes=True, with_flops=True)
    profiler.__enter__()
    return profiler


def profile_figures(profiler: Any, seconds: float) -> dict[str, Any]:
    """FLOP per second within the large products, and the operations that took the most time."""
    import torch

    profiler.__exit__(None, None, None)
    device = "device" if torch.cuda.is_available() else "cpu"
    operations = time_in_products = 0.0
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.flops and event.flops / event.count >= LARGE_PRODUCT and getattr(event, f"self_{device}_time_total"):
            operations += event.flops
            time_in_products += getattr(event, f"self_{device}_time_total") / 1e6
    rows = [(event.key, getattr(event, f"self_{device}_time_total") / 1e6) for event in profiler.key_averages()]
    top = sorted(rows, key=lambda row: -row[1])[:12]
    return {
        "products_per_second": operations / time_in_products if time_in_products else 0.0,
        "products_share": time_in_products / seconds,
        "profile": [[name, taken / seconds] for name, taken in top],
    }


def ours(turns: Turns, settings: dict[str, Any]) -> None:
    """Side: the trainer of enc2gen."""
    import torch

    from enc2gen.data.batching import collate
    from enc2gen.training import Callback, Trainer, TrainingConfig

    model = _model(settings)
    groups = groups_of_examples(model, settings)
    batches = [collate(group, int(model.config.pad_token_id)) for group in groups]
    lengths = [(example.source_length, example.target_length) for group in groups for example in group]
    figures = {
        "operations": 3 * forward_operations(model, lengths),  # backward takes twice the products of forward
        "parameters": model.num_parameters(),
        "vocabulary": model.config.vocab_size,
        "targets": sum(target for _, target in lengths) / len(groups),
        "steps": len(groups),
        "padding": padding_of(groups),
        "versions": {"torch": torch.__version__},
    }
    clock = _Clock(turns, groups, figures)

    class Reporter(Callback):
        def on_start(self, step: int, max_steps: int) -> None:
            clock.begin()

        def on_step(self, metrics: Any) -> None:
            clock.step()

    config = TrainingConfig(
        max_steps=ENDLESS,
        warmup=1,
        schedule="constant",
        learning_rate=1e-5,
        precision=settings["precision"],
        compile=settings["compile"],
        padding_free=settings["padding_free"],
        log_every=1,
        eval_every=ENDLESS,
        save_every=ENDLESS,
        progress=False,
        tensorboard=False,
        seed=settings["seed"],
    )
    with tempfile.TemporaryDirectory() as folder:
        Trainer(model, _Stream(batches), {}, config, Path(folder), [Reporter()]).train()


def reference(turns: Turns, settings: dict[str, Any]) -> None:
    """Side: the trainer of transformers."""
    import torch
    from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

    grown = _model(settings)
    groups = groups_of_examples(grown, settings)
    tokenizer = grown.tokenizer
    model = reference_model(grown)
    del grown
    clock = _Clock(turns, groups, {"parameters": model.num_parameters()})
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)

    class Reporter(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.step()

    rows = [[{"input_ids": list(e.input_ids), "labels": list(e.labels)} for e in group] for group in groups]
    with tempfile.TemporaryDirectory() as folder:
        arguments = Seq2SeqTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,  # one item is one batch, so that both sides see the same ones
            train_sampling_strategy="sequential",
            max_steps=ENDLESS,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            bf16=settings["precision"] == "bf16",
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_steps=ENDLESS,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=settings["seed"],
        )
        Seq2SeqTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=lambda items: collator(items[0]),
            callbacks=[Reporter()],
        ).train()


def _model(settings: Mapping[str, Any]) -> SwcmForConditionalGeneration:
    return build_model(
        settings["model"],
        growth="standard",
        trimmed=settings["trimmed"],
        pairs=settings["pairs"],
        seed=settings["seed"],
    )


def reference_model(grown: SwcmForConditionalGeneration) -> Any:
    """transformers' encoder-decoder of the shape of `grown`: its encoder, a decoder of the same kind, one table."""
    from transformers import AutoModelForCausalLM, EncoderDecoderModel

    encoder = copy.deepcopy(grown.encoder)
    config = copy.deepcopy(encoder.config)
    config.is_decoder = config.add_cross_attention = True
    decoder = AutoModelForCausalLM.from_config(config)
    decoder.base_model.load_state_dict(encoder.state_dict(), strict=False)  # cross-attention is new
    table = encoder.get_input_embeddings()
    decoder.set_input_embeddings(table)
    decoder.get_output_embeddings().weight = table.weight
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.config.decoder_start_token_id = grown.generation_config.decoder_start_token_id
    model.config.pad_token_id = grown.config.pad_token_id
    model.config.vocab_size = config.vocab_size
    return model


def run(question: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure `train_full_vocabulary` or `train_trimmed` and return the entry of the results file."""
    pairs, origin = load_pairs(options["examples"])
    settings = {
        "model": options["model"],
        "trimmed": question == "train_trimmed",
        "pairs": pairs,
        "precision": options["precision"] or "bf16",
        "compile": options["compile"],
        "padding_free": False if options["padded"] else "auto",
        "batches": options["batches"],
        "target_tokens": options["target_tokens"],
        "steps": options["steps"],
        "seed": options["seed"],
    }
    with (
        environment(options["threads"], options["device"]),
        Side(ours, settings) as mine,
        Side(reference, settings) as other,
        Side(matrix_products, settings) as machine,
    ):
        reports = alternate({"ours": mine, "reference": other, "machine": machine}, options["turns"])
        profiles = {"ours": mine.turn("profile"), "reference": other.turn("profile")}
    return entry(reports, profiles, settings, origin)


def entry(
    reports: Mapping[str, list[dict[str, Any]]],
    profiles: Mapping[str, dict[str, Any]],
    settings: Mapping[str, Any],
    origin: str,
) -> dict[str, Any]:
    """What the turns come to, as it is stored."""
    mine, other = reports["ours"], reports["reference"]
    compared = compare(mine, other, "tokens")
    rate = sorted(report["rate"] for report in reports["machine"])[len(reports["machine"]) // 2]
    achieved = {
        side: compared_rate / mine[0]["tokens"] * mine[0]["operations"] / rate
        for side, compared_rate in (("ours", compared.ours), ("reference", compared.reference))
    }
    first = mine[0]
    marks = {
        "compiled": settings["compile"],
        "padded": not settings["padding_free"],
        "by-source": settings["batches"] == "by-source",
    }
    return {
        "speedup": compared.speedup,
        "memory_ratio": peak(mine) / peak(other),
        "spread": compared.spread,
        "variant": [mark for mark, on in marks.items() if on],
        "limit_fraction": achieved["ours"],
        "products_fraction": profiles["ours"]["products_per_second"] / rate,
        "rows": {
            side: {
                "tokens per second": speed,
                "peak memory, GB": peak(reports[side]) / 1e9,
                "share of the matrix-product rate": achieved[side],
                "the same within large products": profiles[side]["products_per_second"] / rate,
                "time in large products": profiles[side]["products_share"],
                "million parameters": reports[side][0]["parameters"] / 1e6,
            }
            for side, speed in (("ours", compared.ours), ("reference", compared.reference))
        },
        "profile": {side: profiles[side]["profile"] for side in profiles},
        "setting": f"{settings['model']}, vocabulary {first['vocabulary']:,}, {settings['precision']}, "
        f"{'our layers compiled, ' if settings['compile'] else ''}{first['steps']} updates a turn of "
        f"{first['targets']:,.0f} target tokens each, {_BATCHES[settings['batches']]} ({first['padding']:.0%} padding"
        f"{'' if settings['padding_free'] else ', kept by ours'}), {len(mine)} turns; {origin}; "
        f"matrix products {rate / 1e9:,.0f} GFLOP/s",
    }
