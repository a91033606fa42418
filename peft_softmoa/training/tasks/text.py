"""Speech recognition: texts, by connectionist temporal classification or by a decoder."""

from __future__ import annotations

import json
import os
import tempfile
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Optional

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCTC, AutoModelForSpeechSeq2Seq, EvalPrediction, Wav2Vec2CTCTokenizer

from ..audio import AudioError
from ..frames import FrameGrid, find_frames
from ..metrics import Form
from ..rows import DatasetSummary, label_name, name_some
from .base import IGNORED, Clip, Task

if TYPE_CHECKING:
    from typing_extensions import Self

# A vocabulary that is made from texts: the blank first, as the adapter's head has it.
BLANK, UNKNOWN, SPACE = "[PAD]", "[UNK]", "|"


@dataclass
class _Recognition(Task):
    """What tasks with texts have in common.

    Args:
        tokenizer (PreTrainedTokenizerBase, optional): between texts and labels. Default: see the task.
        text_case (str, optional): `"lower"` or `"upper"`, into which the texts are put. Default: as they are.
        normalize_text (bool): whether metrics compare texts in lower case, without punctuation. Default: False.
    """

    tokenizer: Any = None
    text_case: Optional[Literal["lower", "upper"]] = None
    normalize_text: bool = False

    label_column: ClassVar[str] = "text"
    default_metrics: ClassVar[tuple[str, ...]] = ("wer", "cer")
    can_crop: ClassVar[bool] = False
    takes_declared: ClassVar[bool] = False

    def parse(self, values: Mapping[str, Any], where: str) -> str:
        text = " ".join(label_name(value, self.declared.get(column), where) for column, value in values.items())
        change: Callable[[str], str] = {"lower": str.lower, "upper": str.upper}.get(self.text_case or "", str)
        return change(text)

    def save(self, folder: str) -> None:
        self.tokenizer.save_pretrained(folder)

    def _texts(self, ids: Any, **options: Any) -> list[str]:
        kept = [[token for token in row if token != IGNORED] for row in np.asarray(ids).tolist()]
        return self.compared(self.tokenizer.batch_decode(kept, **options))

    def compared(self, texts: Iterable[str]) -> list[str]:
        """Texts as the metrics compare them.

        Args:
            texts (iterable of str): as they were written or recognised.

        Returns:
            list[str]: without space around them and, with `normalize_text`, in lower case and without punctuation.
        """
        normalize = _plain if self.normalize_text else str
        return [normalize(text).strip() for text in texts]


def _plain(text: str) -> str:
    """A text in lower case, without punctuation and symbols; letters keep their marks."""
    kept = "".join(" " if unicodedata.category(each)[0] in "PS" and each != "'" else each for each in text.lower())
    return " ".join(kept.split())


@dataclass
class CTC(_Recognition):
    """Connectionist temporal classification: each frame has a character or none (Graves et al. 2006).

    Without a tokenizer the vocabulary are the characters of the training data, and the adapter brings a head for them:
    its `label_names` are the vocabulary, the blank first. With the tokenizer of the model, the model's head is kept.
    """

    _grid: Optional[FrameGrid] = field(default=None, repr=False)

    name: ClassVar[str] = "ctc"
    model_class: ClassVar[Any] = AutoModelForCTC

    def with_labels(self, names: Optional[Sequence[str]], summary: Optional[DatasetSummary] = None) -> Self:
        if self.tokenizer is not None:
            return self
        if not names and summary is None:
            raise ValueError(
                "The vocabulary is made from the texts, which cannot be read without the audio here. Give the model's "
                "own, with `vocabulary='model'`."
            )
        characters = sorted(summary.labels) if summary else []
        tokens = list(names) if names else [BLANK, UNKNOWN, SPACE, *(each for each in characters if each != SPACE)]
        return replace(self, label_names=tokens, tokenizer=make_tokenizer(tokens))

    def labels_in(self, target: str) -> Iterable[str]:
        return target.replace(" ", SPACE)

    def check_known(self, labels: Iterable[str], where: str) -> None:
        known = self.tokenizer.get_vocab()
        unknown = sorted(each for each in labels if each not in known and each.replace(SPACE, " ") not in known)
        if unknown and self.label_names:
            warnings.warn(
                f"{where} has the characters {name_some(map(repr, unknown))}, which the vocabulary does not have: the "
                "model cannot recognise them.",
                stacklevel=2,
            )
        elif unknown:
            raise ValueError(
                f"{where} has the characters {name_some(map(repr, unknown))}, which the model's vocabulary does not "
                "have. Change the texts, with `text_case` or in the dataset, or make a vocabulary of them, with "
                "`vocabulary='texts'`."
            )

    def encode(self, target: str, where: str, clip: Clip) -> Any:
        ids = np.asarray(self.tokenizer(target).input_ids, np.int64)
        if self._grid is not None and len(ids) > self._grid.count(clip.num_samples):
            frames = self._grid.count(clip.num_samples)
            raise AudioError(where, f"its text of {len(ids)} tokens is longer than its {frames} frames")
        return ids

    def prepare(self, model: nn.Module, feature_extractor: Any) -> None:
        self._grid = find_frames(model, feature_extractor)
        config: Any = model.config
        # By default the loss is a sum over the batch, and infinite for a clip that is too short for its text.
        config.ctc_loss_reduction, config.ctc_zero_infinity = "mean", True

    def config_fields(self) -> dict[str, Any]:
        if self.label_names:
            return {"modules_to_save": ["lm_head"], "label_names": self.label_names}
        return {} if self.tokenizer is not None else {"modules_to_save": ["lm_head"]}

    def reduce_outputs(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        ids = super().reduce_outputs(outputs, inputs).argmax(dim=-1)
        mask = inputs.get("attention_mask")
        if mask is None:
            return ids
        lengths = mask.sum(dim=1)
        if "input_values" in inputs and self._grid is not None:
            lengths = (lengths - self._grid.window).div(self._grid.step, rounding_mode="floor") + 1
        else:  # a mask of spectrograms, of which a frame of the model may read several columns
            lengths = (lengths * ids.shape[1] / mask.shape[1]).ceil()
        padded = torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None].to(ids.device)
        return ids.masked_fill(padded, IGNORED)

    def forms(self, prediction: EvalPrediction) -> dict[Form, tuple[Any, Any]]:
        # What the vocabulary does not have is another character in the references than in what is recognised.
        unknown = str(self.tokenizer.unk_token)
        recognised = [text.replace(unknown, "\N{WHITE SQUARE}") for text in self._texts(prediction.predictions)]
        written = self._texts(prediction.label_ids, group_tokens=False)
        return {"texts": (recognised, [text.replace(unknown, "\N{BLACK SQUARE}") for text in written])}


def make_tokenizer(tokens: Sequence[str]) -> Wav2Vec2CTCTokenizer:
    """Make the tokenizer of a vocabulary of characters.

    Args:
        tokens (sequence of str): the vocabulary, in the order of the model's outputs, the blank first.

    Returns:
        Wav2Vec2CTCTokenizer: the tokenizer.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "vocab.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump({token: index for index, token in enumerate(tokens)}, file, ensure_ascii=False)
        return Wav2Vec2CTCTokenizer(
            path, bos_token=None, eos_token=None, unk_token=UNKNOWN, pad_token=BLANK, word_delimiter_token=SPACE
        )


@dataclass
class SpeechSeq2Seq(_Recognition):
    """A decoder writes the text, token by token, as in Whisper. The tokenizer is the model's.

    Args:
        language (str, optional): of the texts; a Whisper of many languages needs it.
        speech_task (str, optional): `"transcribe"` or `"translate"`, for such a Whisper. Default: `"transcribe"`.
    """

    language: Optional[str] = None
    speech_task: Optional[Literal["transcribe", "translate"]] = None
    _start: Optional[int] = field(default=None, repr=False)
    _longest: Optional[int] = field(default=None, repr=False)

    name: ClassVar[str] = "speech-seq2seq"
    model_class: ClassVar[Any] = AutoModelForSpeechSeq2Seq
    generates: ClassVar[bool] = True

    def prepare(self, model: nn.Module, feature_extractor: Any) -> None:
        config: Any = model.config
        generation: Any = model.generation_config
        start: Any = getattr(generation, "decoder_start_token_id", None)
        self._start = getattr(config, "decoder_start_token_id", None) if start is None else start
        longest: Any = getattr(config, "max_target_positions", None)
        self._longest = getattr(config, "max_position_embeddings", None) if longest is None else longest
        if generation is not None and generation.max_length is None:
            generation.max_length = self._longest  # instead of 20 tokens
        is_multilingual = getattr(generation, "is_multilingual", False)
        if not is_multilingual and (self.language or self.speech_task):
            raise ValueError(
                "`language` and `speech_task` are for a Whisper of many languages, which this model is not: leave them "
                "out."
            )
        if is_multilingual:
            if self.language is None:
                raise ValueError(
                    "This Whisper is of many languages, and learns texts of one: give `language`, such as 'en'."
                )
            # The prompt of the labels and of what is generated.
            generation.language, generation.task = self.language, self.speech_task or "transcribe"
            self.tokenizer.set_prefix_tokens(language=generation.language, task=generation.task)

    def encode(self, target: str, where: str, clip: Clip) -> Any:
        ids = list(self.tokenizer(target).input_ids)
        if ids and ids[0] == self._start:  # the model itself puts it in front
            ids = ids[1:]
        end = self.tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids.append(end)
        if self._longest is not None and len(ids) > self._longest:
            raise AudioError(where, f"its text of {len(ids)} tokens is longer than the {self._longest} of the decoder")
        return np.asarray(ids, np.int64)

    def reduce_outputs(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        given = super().reduce_outputs(outputs, inputs)
        return given.argmax(dim=-1) if given.ndim == 3 else given  # generated tokens, unless nothing is generated

    def forms(self, prediction: EvalPrediction) -> dict[Form, tuple[Any, Any]]:
        options = {"skip_special_tokens": True}
        return {"texts": (self._texts(prediction.predictions, **options), self._texts(prediction.label_ids, **options))}
