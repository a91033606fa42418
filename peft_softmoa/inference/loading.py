"""Load a trained adapter."""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
import transformers
from accelerate import PartialState
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer
from transformers.utils import FEATURE_EXTRACTOR_NAME
from transformers.utils.hub import cached_file

from ..quiet import quiet_loading
from ..targets.clip_length import fit_feature_extractor


def load_tokenizer(adapter: str, revision: Optional[str] = None, base_model: Optional[str] = None) -> Any:
    """Load the tokenizer that was saved with an adapter or, if there is none, that of its base model.

    Args:
        adapter (str): folder of the adapter, or its id on the Hub.
        revision (str, optional): branch, tag or commit of the adapter.
        base_model (str, optional): the base model, if it is not the one that the adapter's config names.

    Returns:
        PreTrainedTokenizerBase, optional: the tokenizer; None if neither has one.
    """
    config = PeftConfig.from_pretrained(adapter, revision=revision)
    base = (base_model, None) if base_model else (config.base_model_name_or_path, config.revision)
    for name, commit in ((adapter, revision), base):
        try:
            return AutoTokenizer.from_pretrained(name, revision=commit)
        except (OSError, ValueError, TypeError):  # tokenizers whose files are missing raise each of them
            continue
    return None


def load_adapter(
    adapter: str,
    revision: Optional[str] = None,
    *,
    base_model: Optional[str] = None,
    device: Union[str, torch.device, None] = None,
    dtype: Union[str, torch.dtype, None] = None,
) -> tuple[PeftModel, Any]:
    """Load an adapter onto its base model, and the feature extractor that goes with them.

    Args:
        adapter (str): folder of the adapter, or its id on the Hub.
        revision (str, optional): branch, tag or commit of the adapter.
        base_model (str, optional): folder or id of the base model. Default: what the adapter says.
        device (str or torch.device, optional): where the model is put. Default: the device that Accelerate chooses.
        dtype (str or torch.dtype, optional): dtype of the base model, such as `"float32"`. Default: as it is stored.

    Returns:
        tuple[PeftModel, SequenceFeatureExtractor]: the model, for evaluation, of the class that the adapter was trained
        with, and the feature extractor: the adapter's own or, if it has none, that of the base model.

    Raises:
        ValueError: if the adapter does not say what its base model is, or of which class.
        OSError: if the adapter or its base model cannot be read.
    """
    config = PeftConfig.from_pretrained(adapter, revision=revision)
    base, base_revision = (base_model, None) if base_model else (config.base_model_name_or_path, config.revision)
    if not base:
        raise ValueError(f"The config of '{adapter}' does not name its base model: give `base_model`.")
    names = (
        (config.auto_mapping or {}).get("base_model_class"),
        *(AutoConfig.from_pretrained(base, revision=base_revision).architectures or ()),
    )
    model_class = next((getattr(transformers, name) for name in names if name and hasattr(transformers, name)), None)
    if model_class is None:
        raise ValueError(f"The base model '{base}' of '{adapter}' does not say which class of transformers it is.")
    options = {} if dtype is None else {"dtype": dtype}
    # The adapter brings along what it has trained whole.
    with quiet_loading(config.modules_to_save):
        loaded = model_class.from_pretrained(base, revision=base_revision, **options)
        model = PeftModel.from_pretrained(loaded, adapter, revision=revision)
    own = cached_file(adapter, FEATURE_EXTRACTOR_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
    where = (adapter, revision) if own else (base, base_revision)
    extractors: Any = AutoFeatureExtractor
    with quiet_loading():
        feature_extractor = extractors.from_pretrained(where[0], revision=where[1])
    seconds = getattr(config, "max_length_seconds", None)  # of a Soft-MoA adapter
    if seconds is not None:
        feature_extractor = fit_feature_extractor(feature_extractor, seconds)
    return model.eval().to(device or PartialState().default_device), feature_extractor
