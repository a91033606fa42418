"""Fingerprints of what a run reads, by which a resumed run notices that it has changed under the same name."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any, Optional

import torch
from datasets import DatasetBuilder
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..targets.clip_length import base_parameters
from .audio import name_and_content

NOT_COMPARED = ("_name_or_path", "transformers_version")


class RowDigest:
    """Fingerprints of rows: of their labels and names, and of the audio files that they name.

    Args:
        names_files (bool): whether each row names a file of its own.
    """

    def __init__(self, names_files: bool) -> None:
        self.names_files = names_files
        self._rows, self._audio = _digest(), _digest()

    def add(self, target: Any, audio: Any = None) -> None:
        """Add a row.

        Args:
            target (any): what its labels say, from `Task.parse`.
            audio (any): the undecoded audio, if `names_files`. Default: None.
        """
        _add(self._rows, target)
        if self.names_files:
            name, _ = name_and_content(audio)
            _add(self._rows, os.path.basename(name))
            _add(self._audio, _size_and_time(name))

    def fingerprint(self, files: Optional[str] = None) -> dict[str, str]:
        """The fingerprints.

        Args:
            files (str, optional): fingerprint of the files that hold all rows, if these do not name files of their own.

        Returns:
            dict[str, str]: `rows` and `audio`.
        """
        return {"rows": self._rows.hexdigest(), "audio": files or self._audio.hexdigest()}


def fingerprint_files(builder: DatasetBuilder, split: str) -> str:
    """Fingerprint of the files of a split.

    Args:
        builder (DatasetBuilder): the dataset.
        split (str): name of the split.

    Returns:
        str: of the commit on the Hub, of the ETags of other remote files, or of the sizes and times of local ones.
    """
    digest = _digest()
    files = (builder.config.data_files or {}).get(split)
    for file, origin in zip(files or (), getattr(files, "origin_metadata", ())):
        is_local = os.path.exists(file)
        _add(digest, os.path.basename(file) if is_local else file, *(_size_and_time(file) if is_local else origin))
    return digest.hexdigest()


def fingerprint_clip(audio: Any) -> Optional[str]:
    """Fingerprint of one clip.

    Args:
        audio (Any): the clip, as for `decode_audio`.

    Returns:
        str, optional: of its content or, if it is a local file, of its path, its size and the times of its last
            changes; None if it is neither, such as a URL.
    """
    name, content = name_and_content(audio)
    digest = hashlib.blake2b(content or b"", digest_size=16)
    if content is None:
        try:
            status = os.stat(name)
        except (OSError, ValueError):
            return None
        # Unpacking may restore a time that another file of the same size had before, but not the time of its change.
        _add(digest, os.path.abspath(name), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return digest.hexdigest()


def fingerprint_weights(model: nn.Module) -> str:
    """Fingerprint of the weights that a run does not train, to the bit.

    Parameters that are divided among processes, as by ZeRO-3, count by name only.

    Args:
        model (nn.Module): the model with its adapter.

    Returns:
        str: of the names and contents of frozen parameters and of buffers.
    """
    digest = _digest()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # An adapter's length of clips is no part of the base model.
    frozen = {
        name: tensor
        for name, tensor in {**model.state_dict(), **base_parameters(model)}.items()
        if name not in trained and isinstance(tensor, Tensor)
    }
    total = sum(tensor.nbytes for tensor in frozen.values())
    with tqdm(
        desc="Fingerprint of the base model", total=total, unit="B", unit_scale=True, delay=1, leave=False, disable=None
    ) as progress:
        for name, tensor in frozen.items():
            _add(digest, name, tensor.dtype, tuple(tensor.shape))
            if not tensor.is_meta:
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            progress.update(tensor.nbytes)
    return digest.hexdigest()


def fingerprint_config(config: Any) -> str:
    """Fingerprint of the config of a model or a feature extractor.

    Args:
        config (PretrainedConfig or FeatureExtractionMixin): the config.

    Returns:
        str: of its fields, but for its place and the version of transformers.
    """
    fields = {name: value for name, value in config.to_dict().items() if name not in NOT_COMPARED}
    digest = _digest()
    _add(digest, json.dumps(fields, sort_keys=True, default=str))
    return digest.hexdigest()


def _digest() -> Any:
    return hashlib.blake2b(digest_size=8)


def _add(digest: Any, *parts: Any) -> None:
    digest.update(repr(parts).encode())


def _size_and_time(path: str) -> tuple[Any, ...]:
    """Size and time of the last change, as rsync and make compare files; content would take as long as an epoch."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # it may be a URL, or missing, which reading it will say
        return (path,)
    return status.st_size, status.st_mtime_ns
