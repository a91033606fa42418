"""What an adapter that somebody else has written would change, told from its files alone.

`PeftModel` refuses an adapter that does not fit. transformers reads adapters by itself, and puts any tensor with the
name of one of the base model's in its place. So here the files are read before there is a model: the config, the names
and shapes of the tensors and, a piece at a time, their values.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Optional

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from tqdm.auto import tqdm

from ..config import SoftMoAConfig
from ..dependent_fields import CAUSAL_FIELDS
from ..method.convolution import PatchGrid
from ..method.mixture import parameter_shapes
from ..registration import name_since_0_2
from ..targets.choice import find_matches
from ..targets.patterns import block_configs
from .checks import DTYPES, find_weights, read_tensors
from .pickles import refuse_pickle

PREFIX, MIXTURE = "base_model.model.", ".softmoa_mixture."
FLOATS = dict(zip(DTYPES, (torch.float64, torch.float32, torch.float16, torch.bfloat16)))
FLOATS.update({"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2})
# What a module that is trained whole may hold besides, such as a number of batches.
OTHERS = ("I64", "I32", "I16", "I8", "U8", "BOOL")
LARGEST_WIDTH = 2**20  # of a block's tokens
PIECE = 2**20  # bytes that are read at a time


@dataclass(frozen=True)
class AdapterContents:
    """What an adapter holds and would change; as a string, a table.

    Args:
        base_model (str): the model that it names, which loaders load with it.
        blocks (dict[str, int]): parameters of the mixture of each adapted block, by the block's name.
        saved (dict[str, int]): parameters of each module that it replaces by a copy of its own, by the module's name.
        parameters (int): all of them.
        label_names (tuple[str, ...]): the classes of its head; none if it keeps the base model's.
    """

    base_model: str
    blocks: dict[str, int]
    saved: dict[str, int]
    parameters: int
    label_names: tuple[str, ...]

    def __str__(self) -> str:
        rows: list[tuple[str, Optional[int]]] = [("adapted block", None), *map(_row, self.blocks.items())]
        if self.saved:
            rows += [("trained whole", None), *map(_row, self.saved.items())]
        rows.append(("parameters in all", self.parameters))
        width = max(len(name) for name, _ in rows)
        lines = [name if count is None else f"{name.ljust(width)}  {count:>13,}" for name, count in rows]
        classes = ", ".join(map(repr, self.label_names)) or "those of the base model"
        return "\n".join(
            [*lines, f"classes: {classes}", f"base model: {self.base_model}", "of its weights, none is replaced"]
        )


def _row(entry: tuple[str, int]) -> tuple[str, int]:
    # A name may hold what a terminal obeys.
    return repr(entry[0]), entry[1]


def check_adapter(adapter: str | os.PathLike[str], *, subfolder: Optional[str] = None, **hub: Any) -> AdapterContents:
    """Tell what an adapter would change in a model, or refuse it, without a model and without loading it.

    Args:
        adapter (str or PathLike): the adapter's folder, or its id on the Hub.
        subfolder (str, optional): where it is in there.
        hub (Any): arguments of `huggingface_hub.hf_hub_download`, such as `revision` and `token`.

    Returns:
        AdapterContents: the blocks, modules, parameters and classes; `print` shows a table.

    Raises:
        ValueError: if the config or the weights are damaged, too large or not allowed, do not fit each other, are a
            pickle or not finite, or if there are weights that are not the adapter's.
    """
    adapter = os.fspath(adapter)
    config = SoftMoAConfig.from_pretrained(adapter, subfolder=subfolder, **hub)
    path, has_pickle = find_weights(adapter, subfolder, hub)
    if path is None and has_pickle:
        raise refuse_pickle(adapter)
    if path is None:
        raise ValueError(f"'{adapter}' has no file '{SAFETENSORS_WEIGHTS_NAME}', so that there is nothing to load.")
    tensors = read_tensors(path)
    shapes = {name_since_0_2(name): shape for name, (shape, _) in tensors.items()}
    if len(shapes) < len(tensors):
        raise ValueError(f"'{path}' has the same tensors under their names from before and since version 0.2.")
    blocks = _blocks(shapes)
    saved = _saved(
        shapes.keys() - {f"{PREFIX}{block}{MIXTURE}{name}" for block in blocks for name in blocks[block]}, config
    )
    _check_blocks(path, blocks, config)
    for name, (_, dtype) in tensors.items():
        if dtype not in (*FLOATS, *OTHERS):
            raise ValueError(f"'{path}' has {name!r} as {dtype}; it must be one of {', '.join((*FLOATS, *OTHERS))}.")
    modules = Counter(dict.fromkeys(saved.values(), 0))
    for name, module in saved.items():
        modules[module] += prod(shapes[name])
    labels = tuple(config.label_names or ())
    if labels and not any(shapes[name][:1] == (len(labels),) for name in saved):
        raise ValueError(
            f"'{path}' has no head of {len(labels)} outputs, for which `label_names` in its config has names."
        )
    _check_finite(path)
    return AdapterContents(
        _base_model(config, Path(adapter, subfolder or "")),
        {block: sum(map(prod, parts.values())) for block, parts in blocks.items()},
        dict(modules),
        sum(map(prod, shapes.values())),
        labels,
    )


def _blocks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The parameters of each block's mixture, by the block's name."""
    blocks: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, shape in shapes.items():
        block, mixture, parameter = name.removeprefix(PREFIX).rpartition(MIXTURE)
        if mixture and name.startswith(PREFIX):
            blocks[block][parameter] = shape
    return dict(blocks)


def _saved(names: set[str], config: SoftMoAConfig) -> dict[str, str]:
    """The module of `modules_to_save` to which each of some tensors belongs."""
    endings = tuple(config.modules_to_save or ())
    saved: dict[str, str] = {}
    for name in sorted(names):
        parts = name.removeprefix(PREFIX).split(".")[:-1]
        modules = (".".join(parts[: length + 1]) for length in range(len(parts)))
        module = next((module for module in modules if endings and module.endswith(endings)), None)
        if module is not None and name.startswith(PREFIX):
            saved[name] = module
    if foreign := sorted(names - saved.keys()):
        raise ValueError(
            f"The adapter has {len(foreign)} tensors that are not its own: {', '.join(map(repr, foreign[:4]))}"
            f"{', …' if len(foreign) > 4 else ''}. transformers' loaders (`AutoModel…`, `pipeline()`, "
            "`model.load_adapter`) put such tensors in the place of the base model's weights: do not load it with them."
        )
    return saved


def _check_blocks(path: str, blocks: dict[str, dict[str, tuple[int, ...]]], config: SoftMoAConfig) -> None:
    """Check that the blocks are those of the config, and have the parameters that it asks for."""
    if not blocks:
        raise ValueError(f"'{path}' has no tensors of a Soft-MoA adapter.")
    if config.target_modules not in (None, "all-linear"):
        others = sorted(blocks.keys() - set(find_matches(config, list(blocks))))
        if others:
            raise ValueError(f"'{path}' adapts {others[0]!r}, which `target_modules` in its config does not match.")
    own = block_configs(config, blocks)
    is_causal = any(getattr(config, name) for name in CAUSAL_FIELDS)  # otherwise the shapes are the same
    made: dict[tuple[int, ...], dict[str, tuple[int, ...]]] = {}
    for block, shapes in blocks.items():
        # N x D x R or, with a gate, N x D x 2R, and N x R x D'.
        widths = (*shapes.get("experts.down_weight", ())[1:2], *shapes.get("experts.up_weight", ())[2:])
        kind = (*widths, own[block].num_experts, own[block].r)
        if len(widths) == 2 and all(0 < width <= LARGEST_WIDTH for width in widths) and kind not in made:
            options = own[block].mixture_options()
            if config.patch_grid:
                options["expert_options"]["patch_grid"] = PatchGrid(0, 1, 1)  # any: the kernel's shape is the same
            made[kind] = parameter_shapes(*widths, **options, causal=is_causal)
        if made.get(kind) != shapes:
            raise ValueError(
                f"'{path}' does not fit its config: {block!r} has a mixture of shapes {shapes}, but with these widths "
                f"the config asks for {made.get(kind, 'one that has all its tensors')}."
            )


def _check_finite(path: str) -> None:
    """Check that all values are numbers; the header has been checked before."""
    # Heads may be large; a bar shows after a second.
    bar = tqdm(
        desc="Checking values",
        total=os.path.getsize(path),
        unit="B",
        unit_scale=True,
        delay=1,
        leave=False,
        disable=None,
    )
    with open(path, "rb") as file, bar:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            file.seek(start + begin)
            for place in range(begin, end if entry["dtype"] in FLOATS else begin, PIECE):
                piece = bytearray(file.read(min(PIECE, end - place)))
                bar.update(len(piece))
                values = torch.frombuffer(piece, dtype=FLOATS[entry["dtype"]])
                # torch has no such function for eight bits.
                if not (values.float() if values.itemsize == 1 else values).isfinite().all():
                    raise ValueError(f"'{path}' has values in {name!r} that are infinite or no numbers.")


def _base_model(config: SoftMoAConfig, folder: Path) -> str:
    name = repr(config.base_model_name_or_path)
    if (folder / "config.json").exists():
        return f"{name}, but transformers' loaders take the one in the adapter's folder, {os.fspath(folder)!r}"
    return name
