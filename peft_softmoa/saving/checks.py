"""Checks of an adapter that comes from elsewhere, before anything is built from it or changed for it.

An adapter is a config and a file of tensors that somebody else has written. PEFT reads the config, builds what it asks
for, and then looks at the tensors. Here their names and shapes are read before anything is built, so that what is
damaged, too large or does not belong together is refused while the base model is still as it was.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from ..config import SoftMoAConfig
from ..dependent_fields import PATTERN_FIELDS
from ..fields import shorten
from .pickles import are_allowed, refuse_pickle

DTYPES = ("F64", "F32", "F16", "BF16")  # of an adapter's tensors

LARGEST_HEADER = 2**22  # bytes; reading it takes many times as much memory

# An adapter has at most so many parameters, or so many times those of its base model, whichever is more.
MOST_PARAMETERS = 2**24
TIMES_THE_BASE = 10


def read_shapes(model_id: str, subfolder: Optional[str], **hub: Any) -> Optional[dict[str, tuple[int, ...]]]:
    """Read which tensors an adapter has, without reading them.

    Args:
        model_id (str): the adapter's folder, or its id on the Hub.
        subfolder (str, optional): where it is in there.
        hub: arguments of `huggingface_hub.hf_hub_download`.

    Returns:
        dict[str, tuple[int, ...]], optional: the shape of each tensor by its name; None if there are no weights.

    Raises:
        ValueError: if the weights are damaged, or if they are pickled: reading them could run a program.
    """
    path, has_pickle = find_weights(model_id, subfolder, hub)
    if path is None and has_pickle and not are_allowed():
        raise refuse_pickle(model_id)
    return None if path is None else {name: shape for name, (shape, _) in read_tensors(path).items()}


def read_tensors(path: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Read the header of a file of tensors.

    Args:
        path (str): the file.

    Returns:
        dict[str, tuple[tuple[int, ...], str]]: the shape and dtype of each tensor, by its name.

    Raises:
        ValueError: if the file is damaged, its header too large, or a dtype that of no adapter.
    """
    with open(path, "rb") as binary:
        size = int.from_bytes(binary.read(8), "little")
    if LARGEST_HEADER < size <= os.path.getsize(path):
        raise ValueError(f"'{path}' has a header of {size:,} bytes, and more than {LARGEST_HEADER:,} are no adapter's.")
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            slices = {name: file.get_slice(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged, or was not written to its end: {error}. Get it again.") from error
    tensors = {name: (tuple(tensor.get_shape()), tensor.get_dtype()) for name, tensor in slices.items()}
    for name, (_, dtype) in tensors.items():
        if ".softmoa_" in name and dtype not in DTYPES:
            raise ValueError(f"'{path}' has '{name}' as {dtype}; it must be one of {', '.join(DTYPES)}.")
    return tensors


def find_weights(model_id: str, subfolder: Optional[str], hub: Mapping[str, Any]) -> tuple[Optional[str], bool]:
    """Find the file of an adapter's tensors.

    Args:
        model_id (str): the adapter's folder, or its id on the Hub.
        subfolder (str, optional): where it is in there.
        hub (mapping): arguments of `huggingface_hub.hf_hub_download`.

    Returns:
        tuple[Optional[str], bool]: the file, if there is one, and whether, if not, there is one of pickled tensors.
    """
    if os.path.isdir(model_id):
        folder = Path(model_id, subfolder or "")
        path = folder / SAFETENSORS_WEIGHTS_NAME
        return (str(path) if path.is_file() else None), (folder / WEIGHTS_NAME).is_file()
    pickle = "/".join(filter(None, (subfolder, WEIGHTS_NAME)))
    options = {key: hub[key] for key in ("revision", "repo_type") if key in hub}
    try:
        return hf_hub_download(model_id, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **hub), False
    except LocalEntryNotFoundError:  # without a connection there is only what was downloaded before
        cached = try_to_load_from_cache(model_id, pickle, cache_dir=hub.get("cache_dir"), **options)
        return None, isinstance(cached, str)
    except EntryNotFoundError:
        api = HfApi(hub.get("endpoint"), token=hub.get("token"))
        return None, api.file_exists(model_id, pickle, **options)


def check_size(config: SoftMoAConfig, parameters: int, model: nn.Module) -> None:
    """Check that a config does not ask for more memory than anybody would give an adapter.

    Args:
        config (SoftMoAConfig): the config.
        parameters (int): how many parameters it asks for.
        model (nn.Module): the base model.

    Raises:
        ValueError: if they are more than ten times those of the base model, and more than 2^24.
    """
    # Under DeepSpeed's ZeRO-3 a process has only its part of them.
    base = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    most = max(MOST_PARAMETERS, TIMES_THE_BASE * base)
    if parameters > most:
        sizes = {name: config.choices()[name] for name in ("num_experts", "num_slots", "r")}
        sizes |= {name: shorten(value) for name in PATTERN_FIELDS if (value := getattr(config, name))}
        given = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"The config asks for {parameters:,} parameters, with {given}, but on this model an adapter may have at "
            f"most {most:,}. Choose fewer or smaller experts."
        )


def check_shapes(
    given: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    embeddings: Mapping[str, tuple[int, ...]],
) -> None:
    """Check that an adapter has the tensors that its config asks for, before they are made.

    Args:
        given (mapping): the shape of each tensor that the adapter has, by its name in the base model.
        expected (mapping): the same for those that it should have.
        embeddings (mapping): the same for those that it may have besides.

    Raises:
        ValueError: if the adapter lacks tensors or has others.
    """
    has, wanted, allowed = (set(each.items()) for each in (given, expected, embeddings))
    problems = [f"it lacks '{name}' of shape {shape}" for name, shape in sorted(wanted - has)]
    problems += [f"it has '{name}' of shape {shape}" for name, shape in sorted(has - wanted - allowed)]
    if problems:
        raise ValueError(
            f"The adapter does not fit its config: on this base model {'; '.join(problems[:3] + problems[3:][-3:])}. "
            f"Load it with the {CONFIG_NAME} that it was saved with, onto the base model that it was trained on. To "
            "make a fresh adapter with the same choices, give `dataclasses.replace(config)`."
        )


def text_embeddings(model: nn.Module) -> tuple[Optional[nn.Module], Optional[nn.Module]]:
    """The modules that read and write text; None for those that a model does not have.

    Args:
        model (nn.Module): the base model.

    Returns:
        tuple[nn.Module, optional, nn.Module, optional]: the embeddings, and the head.
    """
    # Encoders of audio have both methods, and some of them raise an error there.
    found: list[Any] = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, name)())
        except (AttributeError, NotImplementedError):
            found.append(None)
    return found[0], found[1]


def embedding_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The text embeddings of a model, which PEFT saves with an adapter if they were resized.

    Args:
        model (nn.Module): the base model.

    Returns:
        dict[str, tuple[int, ...]]: the shapes of the input's and the output's, by their names; none if the model reads
        no text.
    """
    both = text_embeddings(model)
    if not isinstance(both[0], nn.Embedding):
        return {}
    modules = {name: module for name, module in model.named_modules() if any(module is each for each in both)}
    weights = {f"{name}.weight": module.weight for name, module in modules.items()}
    # ZeRO-3 leaves their shape beside them, too.
    return {name: tuple(getattr(weight, "ds_shape", weight.shape)) for name, weight in weights.items()}
