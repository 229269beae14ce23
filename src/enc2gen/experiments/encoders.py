"""Stages `vocabulary` and `adapt`: the encoders of a recipe, made ready before decoders grow out of them."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from enc2gen.corpora.languages import language_name
from enc2gen.encoders.donor import donor_for
from enc2gen.encoders.loading import load_encoder, load_tokenizer
from enc2gen.errors import DataError
from enc2gen.experiments.encoder_config import EncoderConfig, ExtensionConfig
from enc2gen.experiments.prepare import PreparedData
from enc2gen.experiments.recipe import Recipe, digest
from enc2gen.experiments.workspace import Workspace
from enc2gen.models.embedding_init import InitialisedRows, initialise_rows
from enc2gen.models.masked_lm import load_masked_lm
from enc2gen.models.surgery import load_for_surgery, replace_vocabulary
from enc2gen.models.surgery.replacing import output_layer
from enc2gen.models.swcm.growing import table_of
from enc2gen.tokenization.extension import ExtendedVocabulary, extend_vocabulary
from enc2gen.tokenization.vocabulary import trim_vocabulary, unknown_rate
from enc2gen.training.adaptation import AdaptationConfig, adapt_encoder
from enc2gen.training.checkpoint import writing

UNKNOWN_WARNING = 0.05
"""Share of a language's characters inside <unk> from which a run warns (our choice)."""
DEV_TEXTS = 300
"""Most development texts per language that sizes are chosen on and adaptation is measured on (our choice)."""

Log = Callable[[str], None]


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as trimmed, and as extended after that (None: not done)."""

    tokens_before: int
    tokenizer: PreTrainedTokenizerBase
    kept: list[int] | None
    extended: ExtendedVocabulary | None


def make_vocabulary(
    recipe: Recipe, workspace: Workspace, variant: str, log: Log, made: dict[str, Vocabulary] | None = None
) -> None:
    """Trim and extend the tokenizer of an encoder; save it, and the encoder too where its rows or layers change.

    Writes `encoders/VARIANT/vocabulary.json`, `tokenizer/` and, if the recipe extends or adapts, `start/`.

    Args:
        made: vocabularies made before in this run; encoders that differ in their rows alone share one.

    Raises:
        DataError: a language stays unreadable for the tokenizer.
        ModelError: a tokenizer that cannot be trimmed or extended.
    """
    config = recipe.variants[variant]
    data = PreparedData(workspace.data)
    extension = config.extend_vocabulary
    settings = extension.model_dump(mode="json", exclude={"initialisation"}) if extension else None
    key = digest([config.name, config.trim_vocabulary, settings])
    made = {} if made is None else made
    if key not in made:
        made[key] = _vocabulary(recipe, config, data, log)
    vocabulary = made[key]
    tokenizer, kept, extended, before = (
        vocabulary.tokenizer,
        vocabulary.kept,
        vocabulary.extended,
        vocabulary.tokens_before,
    )
    final = extended.tokenizer if extended else tokenizer
    trials = [asdict(trial) for trial in extended.trials] if extended else []
    unknown = _check_unknown(config, data, {"before": tokenizer, "after": final}, log)
    record: dict[str, Any] = {
        "tokens_before": before,
        "tokens": len(final),
        "new_pieces": len(extended.pieces) if extended else 0,
        "size_trials": trials,
        "kept_ids": kept,
        "unknown_rate": unknown["after"],
        "unknown_rate_before": unknown["before"],
    }
    folder = workspace.encoder(variant)
    if config.changes_weights:
        record["initialisation"] = _save_start(recipe, config, data, tokenizer, kept, extended, folder / "start", log)
    with writing(folder):
        final.save_pretrained(folder / "tokenizer")
    workspace.write_json(folder / "vocabulary.json", record)
    if kept is not None:
        log(f"vocabulary: {before:,} tokens trimmed to {len(kept):,}")
    if extended:
        log(f"vocabulary: {len(extended.pieces):,} new pieces, {len(final):,} tokens in the whole")


def _vocabulary(recipe: Recipe, config: EncoderConfig, data: PreparedData, log: Log) -> Vocabulary:
    tokenizer = load_tokenizer(config.name)
    before, kept = len(tokenizer), None
    if config.trim_vocabulary:
        trimmed = trim_vocabulary(tokenizer, (text for text, _ in texts_of(data, "train")))
        tokenizer, kept = trimmed.tokenizer, trimmed.kept_ids
    extension = config.extend_vocabulary
    extended = None if extension is None else _extend(recipe, extension, data, tokenizer, log)
    return Vocabulary(before, tokenizer, kept, extended)


def texts_of(data: PreparedData, split: str) -> Iterator[tuple[str, str | None]]:
    """Every text of a split with its language: sources, targets and, for `train`, the plain texts."""
    for row in data.examples(split):
        yield row["source"], row["source_language"]
        yield row["target"], row["target_language"]
    if split == "train":
        for row in data.texts():
            yield row["text"], row["language"]


def _extend(
    recipe: Recipe, config: ExtensionConfig, data: PreparedData, tokenizer: PreTrainedTokenizerBase, log: Log
) -> ExtendedVocabulary:
    languages = set(config.languages or recipe.languages)
    texts = list(dict.fromkeys(text for text, language in texts_of(data, "train") if language in languages))
    if not texts:
        raise DataError(
            f"there is no text in {', '.join(sorted(languages))} to learn pieces from",
            where="encoder.extend_vocabulary.languages",
            remedy="name languages of the recipe's data, or add monolingual text",
        )
    log(f"vocabulary: learning new pieces from {len(texts):,} texts")
    return extend_vocabulary(
        tokenizer,
        texts,
        size=config.size,
        dev_texts=_first_of_each(data, languages),
        byte_fallback=config.byte_fallback,
        keep_characters=config.keep_characters,
        seed=recipe.seed,
    )


def _first_of_each(data: PreparedData, languages: set[str]) -> list[str]:
    """The first development texts of each language: data sets lie one after the other, as do their languages."""
    found: dict[str, None] = {}
    taken: Counter[str | None] = Counter()
    for text, language in texts_of(data, "dev"):
        if language in languages and taken[language] < DEV_TEXTS and text not in found:
            found[text] = None
            taken[language] += 1
    return list(found)


def _check_unknown(
    config: EncoderConfig, data: PreparedData, tokenizers: Mapping[str, PreTrainedTokenizerBase], log: Log
) -> dict[str, dict[str, float]]:
    """Unknown rates of the test targets by language, before and after the extension; raises where too much is lost."""
    texts: dict[str, list[str]] = {}
    for row in data.examples("test"):
        texts.setdefault(row["target_language"], []).append(row["target"])
    rates = {
        name: {tag: unknown_rate(tokenizer, rows[:DEV_TEXTS]) for tag, rows in texts.items()}
        for name, tokenizer in tokenizers.items()
    }
    for tag, rate in rates["after"].items():
        if rate > config.unknown_limit:
            raise DataError(
                f"{rate:.0%} of the {language_name(tag)} test characters are unknown to the encoder's tokenizer",
                where=config.name,
                remedy="extend the vocabulary: set encoder.extend_vocabulary in the recipe (docs/new-language.md), or "
                f"choose an encoder whose vocabulary covers {language_name(tag)}",
            )
        if rate > UNKNOWN_WARNING:
            log(f"warning: {rate:.0%} of the {tag} test characters are unknown to the encoder's tokenizer and get lost")
    return rates


def _save_start(
    recipe: Recipe,
    config: EncoderConfig,
    data: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
    kept: list[int] | None,
    extended: ExtendedVocabulary | None,
    folder: Path,
    log: Log,
) -> dict[str, int]:
    """Save the encoder with its layers and rows as they are before adaptation; returns where new rows come from."""
    model, _ = load_for_surgery(config.name)
    if config.layers is not None:
        base = cast(PreTrainedModel, model.base_model)
        donor_for(base.config).keep_layers(base, config.layers)
        model.config.num_hidden_layers = base.config.num_hidden_layers
    if kept is not None:
        replace_vocabulary(model, table_of(model)[kept], kept, tokenizer)
    counts: dict[str, int] = {}
    final = tokenizer
    if extended is not None and config.extend_vocabulary is not None:
        settings = config.extend_vocabulary
        log(f"vocabulary: rows of new pieces by {settings.initialisation.method}")
        table, head = cast(nn.Embedding, model.get_input_embeddings()).weight, output_layer(model)

        def initialised(old: Tensor) -> InitialisedRows:
            contexts = _contexts(data, set(settings.languages or recipe.languages))
            new, origins, how = extended.tokenizer, extended.origins, settings.initialisation
            return initialise_rows(old, tokenizer, new, origins, how, texts=contexts, seed=recipe.seed)

        rows = initialised(table_of(model))
        # A head of its own (EuroBERT) would give all new pieces the same row, and with it the same probability.
        tied = head is None or head.weight is table
        head_rows = None if tied else initialised(cast(nn.Linear, head).weight.detach()).table
        replace_vocabulary(model, rows.table, extended.origins, extended.tokenizer, head_rows=head_rows)
        counts, final = rows.summary, extended.tokenizer
    with writing(folder):
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        final.save_pretrained(folder)
    return counts


def _contexts(data: PreparedData, languages: set[str]) -> Iterator[str | tuple[str, str]]:
    """What word vectors are learnt from: pairs with one side in `languages`, and plain texts in them."""
    for row in data.examples("train"):
        sides = row["source_language"], row["target_language"]
        if languages & set(sides):
            yield row["source"] if sides[0] == sides[1] else (row["source"], row["target"])
    for row in data.texts():
        if row["language"] in languages:
            yield row["text"]


def adapt(recipe: Recipe, workspace: Workspace, variant: str, log: Log) -> bool:
    """Train the encoder's masked-LM objective on the prepared text; writes `encoders/VARIANT/adaptation/`.

    Returns:
        Whether training was interrupted; everything is saved then, and the next call goes on.
    """
    config = recipe.variants[variant]
    assert config.adapt is not None
    folder = workspace.encoder(variant)
    data = PreparedData(workspace.data)
    rows = [(text, language or "und") for text, language in dict.fromkeys(texts_of(data, "train"))]
    dev: dict[str, list[str]] = {}
    for text, language in dict.fromkeys(texts_of(data, "dev")):
        dev.setdefault(language or "und", []).append(text)
    record = workspace.read_json(folder / "vocabulary.json")
    tokens, new = record["tokens"], record["new_pieces"]
    result = adapt_encoder(
        load_masked_lm(folder / "start"),
        load_tokenizer(folder / "start"),
        rows,
        [(text, language) for language, texts in sorted(dev.items()) for text in texts[:DEV_TEXTS]],
        config.adapt,
        folder / "adaptation",
        seed=recipe.seed,
        new_ids=range(tokens - new, tokens),
        log=log,
    )
    if result.interrupted:
        return True
    if workspace.processes.is_main_process:
        summary = {
            "before": result.bits_per_byte_before,
            "after": result.bits_per_byte,
            "stages": {stage.name: stage.bits_per_byte for stage in result.stages},
            "steps": result.steps,
            "seconds": result.seconds,
        }
        workspace.write_json(folder / "adaptation.json", summary)
    return False


def adaptation_identity(config: AdaptationConfig) -> dict[str, Any]:
    """The settings that decide the adapted weights; a resumed adaptation has the same ones."""
    stages = {name: settings.identity() for name, settings in config.stages().items()}
    return config.model_dump(mode="json", exclude={"embeddings_only", "training"}) | {"stages": stages}


def prepared_encoder(
    recipe: Recipe, workspace: Workspace, name: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[int] | None]:
    """The encoder and tokenizer that a system grows from, and the layers that are left to cut (None: none)."""
    variant = recipe.variant(name)
    config, folder = recipe.variants[variant], workspace.encoder(variant)
    tokenizer = load_tokenizer(folder / "tokenizer")
    if config.changes_weights:
        saved = folder / "start" if config.adapt is None else folder / "adaptation" / "encoder"
        encoder, layers = load_encoder(saved), None
    else:
        kept = workspace.read_json(folder / "vocabulary.json")["kept_ids"]
        encoder, layers = load_encoder(config.name, rows=kept), config.layers
    encoder.config.name_or_path = config.name
    return encoder, tokenizer, layers
