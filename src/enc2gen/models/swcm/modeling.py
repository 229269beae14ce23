"""XLM-SWCM as a transformers model (arXiv 2502.10852).

Shapes: B batch, S source length, T target length, H hidden size, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from enc2gen.corpora.languages import normalise_language
from enc2gen.encoders.donor import NormOrder
from enc2gen.encoders.loading import load_tokenizer
from enc2gen.encoders.safe_weights import refuse_pickles
from enc2gen.errors import LanguageError, ModelError
from enc2gen.models.dropout import use_quick_dropout
from enc2gen.models.extra_losses import ExtraLosses
from enc2gen.models.swcm.configuration import COPY_PARTS, FreshOutput, Growth, SwcmConfig, TopNorm, growth_options
from enc2gen.models.swcm.decoder import SwcmDecoder, SwcmPreTrainedModel
from enc2gen.models.swcm.generating import decoder_start
from enc2gen.models.swcm.inputs import check_labels, check_source
from enc2gen.models.swcm.losses import padding_free_loss, training_loss
from enc2gen.models.swcm.report import REPORT_FILE, InitReport
from enc2gen.models.swcm.sources import tied_parameters
from enc2gen.models.token_loss import TokenLoss, mean_cross_entropy
from enc2gen.models.training_attention import use_training_attention


class SwcmForConditionalGeneration(SwcmPreTrainedModel, GenerationMixin):
    """Encoder, grown decoder and LM head. Build one with `from_encoder`, load one with `from_pretrained`.

    The encoder is transformers' own module. One word embedding table serves encoder and decoder, and the LM head too
    where `tie_lm_head` is set.

    Attributes:
        init_report: where each decoder tensor came from; saved and loaded with the model.
        tokenizer: saved beside the model where set; of a loaded model that of its folder, where it has one.
        padding_free: whether training computes the loss with `label_smoothing` of ids and masks on real tokens only.
    """

    main_input_name = "input_ids"

    def __init__(self, config: SwcmConfig) -> None:
        super().__init__(config)
        if not config.tie_word_embeddings:  # the decoder's embeddings, which are not saved twice, would stay random
            raise ModelError(
                "encoder and decoder cannot have word embeddings apart",
                where="tie_word_embeddings",
                remedy="leave it True; from_encoder(..., tie_lm_head=False) unties the LM head",
            )
        self.encoder = _bare_encoder(config)
        self.decoder = SwcmDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        use_quick_dropout(self)
        use_training_attention(self)
        self.init_report: InitReport | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._tokenizer_folder: Path | None = None
        self.padding_free = False
        # transformers 5 wants {target: source}; built per model, because tied layers depend on the plan.
        self._tied_weights_keys = tied_parameters(config)
        self.post_init()

    @classmethod
    def from_encoder(
        cls,
        encoder: str | os.PathLike[str] | PreTrainedModel,
        *,
        insert_every: int | None = 3,
        normal_after_last: bool = True,
        normal_layers: Literal["random", "duplicate"] = "random",
        growth: Growth = "swcm",
        copy: Sequence[str] = COPY_PARTS,
        sharing: Literal["copy", "tied"] = "copy",
        tie_lm_head: bool = True,
        encoder_layers: Sequence[int] | None = None,
        donor_layers: Sequence[int] | None = None,
        norm_order: NormOrder | None = None,
        random_encoder: bool = False,
        fresh_output: FreshOutput = "random",
        top_norm: TopNorm = "copied",
        qk_norm: bool = False,
        languages: Sequence[str] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        dropout: float | None = None,
        seed: int = 0,
        verbose: bool = True,
    ) -> SwcmForConditionalGeneration:
        """Grow a generator out of a pretrained encoder (arXiv 2502.10852, section 3).

        Args:
            encoder: Hub name, folder, `embedded:multilingual-e5-small`, or a loaded model (which is not changed; on the
                meta device the result is on the meta device too).
            insert_every: X: a normal layer after every X custom layers; `None` for none (the paper's BASE-A).
            normal_after_last: True: the paper's depth, n + floor(n / X). False: the released checkpoint's, one
                layer less where X divides n.
            normal_layers: `random` (the paper) or `duplicate` (BASE-B: the preceding custom layer again).
            growth: `swcm`, `deltalm` (arXiv 2106.13736) or `standard` (normal layers only: Cino-Transformer).
            copy: which parts are taken from the encoder, out of `embeddings`, `self_attention`, `cross_attention`,
                `ffn`, `norms`. The paper takes all.
            sharing: `copy` at initialisation (the paper) or `tied`: the parameters stay one and the same (our variant).
            tie_lm_head: one parameter for output projection and word embeddings. The released checkpoint's is untied.
            encoder_layers: keep only these encoder layers (small machines); all by default.
            donor_layers: encoder layers that decoder layers grow from, in the encoder's numbering; by default all kept.
            norm_order: the donor's by default. Copied post-norm weights do not work in pre-norm order, which is
                for random decoders.
            random_encoder: start the encoder from random weights as well (the baseline "everything random").
            fresh_output: `zero`: the last projection of every randomly initialised sub-layer starts at zero, so that
                the decoder starts as the one without them (in post-norm order nearly: see `models.swcm.fresh`).
            top_norm: `copied` (the paper) or `unit`: the norm below the LM head starts with gains of root mean square 1
                (see `models.swcm.fresh`).
            qk_norm: RMS-norm each head's queries and keys in the decoder (arXiv 2010.04245, 2302.05442). Copied
                attention then starts with scores of another scale.
            languages: tags whose tokens are added to vocabulary, tokenizer and embedding table.
            tokenizer: the encoder's; loaded by name where not given. It is copied, not changed.
            dropout: replaces the encoder's dropout rates in encoder and decoder; `None` keeps them.
            seed: of every random tensor.
            verbose: print the init report's summary to standard error.

        Returns:
            The model in evaluation mode, with `init_report` and (where known) `tokenizer` set.

        Raises:
            ModelError: unsupported encoder, no fast tokenizer, or a tensor that should have been copied but was not.
            ConfigError, LanguageError: an option is not valid.
        """
        given = {name: value for name, value in locals().items() if name not in ("cls", "encoder")}
        from enc2gen.models.swcm.growing import grow

        return grow(encoder, growth_options(given))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """As set; else read from the folder the model was loaded from, when first asked for: most never ask."""
        if self._tokenizer is None and self._tokenizer_folder is not None:
            folder, self._tokenizer_folder = self._tokenizer_folder, None
            self._tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, value: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer, self._tokenizer_folder = value, None

    def get_encoder(self, modality: str | None = None) -> PreTrainedModel:
        """The encoder, transformers' own module."""
        return self.encoder

    def get_decoder(self) -> SwcmDecoder:
        """The grown decoder."""
        return self.decoder

    def get_input_embeddings(self) -> nn.Module:
        """The shared word embedding table, `[V, H]`."""
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the shared word embedding table in encoder and decoder."""
        self.encoder.set_input_embeddings(value)
        self.decoder.set_input_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; keeps the encoder's configuration in step with the new size."""
        table = super().resize_token_embeddings(*args, **kwargs)
        self.config.encoder_config.vocab_size = self.config.vocab_size = table.weight.shape[0]
        self.decoder.embed_tokens.num_embeddings = table.weight.shape[0]
        return table

    def get_output_embeddings(self) -> nn.Linear:
        """The LM head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the LM head."""
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        label_smoothing: float | None = None,
        extra_losses: ExtraLosses | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> Seq2SeqLMOutput | TokenLoss | tuple[Tensor, ...]:
        """Predict each target token from the source and the target tokens before it.

        Args:
            input_ids: source, `[B, S]`: `<s> <language> tokens </s>`.
            attention_mask: `[B, S]`, 1 for real tokens.
            decoder_input_ids: `[B, T]`: target language token, then target tokens. Made from `labels` where missing.
            labels: `[B, T]`: target tokens, then `</s>`; -100 is ignored.
            logits_to_keep: compute logits of this many last positions only (0 = all).
            label_smoothing: where given, no logits are computed: only the loss of `labels`, with this smoothing.
            extra_losses: what else is in that loss.
            num_items_in_batch: divides the loss, instead of the targets here (accumulation in transformers' Trainer).

        Returns:
            `loss` (mean cross-entropy per target token, nats), `logits` `[B, T, V]`, cache, states; or with
            `label_smoothing` the summed loss alone.

        Raises:
            ModelError: source or target longer than the model's positions, or no target given.
            LanguageError: `decoder_input_ids` have to be made but no target language is known.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        target = decoder_input_ids if decoder_input_ids is not None else decoder_inputs_embeds
        if labels is not None and target is not None:
            check_labels(labels, target, logits_to_keep)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "labels": labels,
        }
        others = (encoder_outputs, past_key_values, inputs_embeds, decoder_inputs_embeds, decoder_position_ids)
        plain = label_smoothing is not None and all(other is None for other in (*others, token_type_ids))
        if self.padding_free and self.training and plain and input_ids is not None:
            check_source(self.encoder, input_ids)
            return padding_free_loss(self, inputs, label_smoothing or 0.0, extra_losses)
        if encoder_outputs is None:
            encoder_outputs = self._encode(
                input_ids, attention_mask, inputs_embeds, token_type_ids, output_attentions, output_hidden_states
            )
        elif isinstance(encoder_outputs, tuple):
            encoder_outputs = BaseModelOutput(*cast(Any, encoder_outputs))
        decoded = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs[0],
            encoder_attention_mask=attention_mask,
            position_ids=decoder_position_ids,
            past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache if use_cache is not None else (labels is None and self.config.use_cache),
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        if label_smoothing is not None:
            states = decoded.last_hidden_state, encoder_outputs[0]
            return training_loss(self, *states, inputs, label_smoothing, extra_losses)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        positions = keep if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(decoded.last_hidden_state[:, positions])
        loss = None if labels is None else mean_cross_entropy(logits, labels, num_items_in_batch)
        output = Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=decoded.past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )
        as_dict = return_dict if return_dict is not None else self.config.return_dict
        return output if as_dict else output.to_tuple()

    def _encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        token_type_ids: Tensor | None,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
    ) -> BaseModelOutput:
        source = input_ids if input_ids is not None else inputs_embeds
        if source is None:
            raise ModelError("no source: give input_ids, inputs_embeds or encoder_outputs")
        check_source(self.encoder, source)
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}  # not every encoder has them
        return self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **types,
        )

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Shift `labels` `[B, T]` right behind the default target language's token."""
        start = self.generation_config.decoder_start_token_id
        if start is None:
            raise LanguageError(
                "decoder_input_ids cannot be made from labels without a target language",
                where="decoder_input_ids",
                remedy="pass decoder_input_ids that begin with the language token, or call set_default_target_language",
            )
        shifted = labels.new_full(labels.shape, start)
        shifted[:, 1:] = labels[:, :-1]
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    def language_id(self, language: str) -> int:
        """Id of the language's token; `LanguageError` where the model does not know this language."""
        return self.config.language_ids[self._known_language(language)]

    def _known_language(self, language: str) -> str:
        """The tag under which the model knows `language`; raises as :meth:`language_id`."""
        ids = self.config.language_ids
        if language not in ids:
            language = normalise_language(language, where="target_language")
        if language not in ids:
            raise LanguageError(
                f"this model has no language {language!r}",
                where="target_language",
                remedy=f"use one of: {', '.join(sorted(ids)) or '(the model was built without languages)'}",
            )
        return language

    def set_default_target_language(self, language: str) -> None:
        """Make `language` the one that is written when `generate` is not told otherwise; saved with the model."""
        self.config.default_target_language = self._known_language(language)
        self.generation_config.decoder_start_token_id = self.language_id(language)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        target_language: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`, started with the target language's token.

        Args:
            inputs: source ids, `[B, S]`.
            target_language: one tag for the batch, or one per source; the model's default where missing.

        Returns:
            Ids `[B, T]`, beginning with the language token; or what `return_dict_in_generate` asks for.

        Raises:
            LanguageError: the model has no such language, or none was given and there is no default.
        """
        for source in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
            if source is not None:
                check_source(self.encoder, source)
        kwargs = decoder_start(self, inputs if inputs is not None else kwargs.get("input_ids"), target_language, kwargs)
        return cast(Any, super()).generate(inputs, *args, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As in transformers; saves tokenizer and init report too, where known (first, so that a push has them)."""
        if is_main_process:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            if self.init_report is not None:
                self.init_report.save(Path(save_directory) / REPORT_FILE)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(save_directory)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a folder's init report and tokenizer come with it."""
        if pretrained_model_name_or_path is not None:
            refuse_pickles(pretrained_model_name_or_path)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if pretrained_model_name_or_path is not None:
            model._tokenizer_folder = Path(pretrained_model_name_or_path)
            report = model._tokenizer_folder / REPORT_FILE
            model.init_report = InitReport.load(report) if report.is_file() else None
        return loaded


def _bare_encoder(config: SwcmConfig) -> PreTrainedModel:
    """The encoder module of `config`, without the pooler that only classification uses."""
    encoder: PreTrainedModel = AutoModel.from_config(config.encoder_config)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # type: ignore[assignment]
    return encoder
