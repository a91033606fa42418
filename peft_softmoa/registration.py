"""How a third-party method enters PEFT's registry.

PEFT names its methods in the enum `PeftType` and has no way to add one from outside, while
`register_peft_method` accepts only names that are members. This module adds the member and registers
the tuner; everything else in PEFT then treats it like a built-in method.
"""

from __future__ import annotations

import enum

import peft
from packaging.version import Version
from peft import mapping
from peft.utils import PeftType
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming

OLDEST_PEFT = "0.21.0"
NEWEST_TESTED_PEFT = "0.21.2"

# The containers of an adapter's parameters before version 0.2, and where their parameters are now.
FIRST_CONTAINERS = {"softmoa_router": "router", "softmoa_experts": "experts"}


def _unsupported(reason: str) -> ImportError:
    return ImportError(
        f"peft-softmoa cannot register its tuner with peft {peft.__version__}: {reason}. It needs "
        f"peft >= {OLDEST_PEFT} and is tested up to {NEWEST_TESTED_PEFT}: "
        f"pip install 'peft>={OLDEST_PEFT},<={NEWEST_TESTED_PEFT}'"
    )


def add_peft_type(name: str) -> PeftType:
    """Add a member to the closed enum `PeftType`, or return it if it is there.

    The other members, their order and their values stay as they are.

    Args:
        name (str): name and value of the member, upper case.

    Returns:
        PeftType: the member.

    Raises:
        ImportError: if the installed PEFT's enum cannot be extended; it names the versions that can.
    """
    if Version(peft.__version__) < Version(OLDEST_PEFT):
        raise _unsupported("it is too old")
    if not (issubclass(PeftType, str) and issubclass(PeftType, enum.Enum)):
        raise _unsupported("its PeftType is no longer an enum of strings")
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType)  # type: ignore[attr-defined]
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # Later Pythons keep a second list of the values, which `in` reads.
    getattr(PeftType, "_hashable_values_", []).append(name)
    # The metaclass refuses to set members; `type` does not.
    type.__setattr__(PeftType, name, member)
    if PeftType(name) is not member or member not in list(PeftType):
        raise _unsupported("its PeftType cannot be extended")
    return member


SOFTMOA = add_peft_type("SOFTMOA")


def name_since_0_2(key: str) -> str:
    """The name of a tensor of an adapter, also of one that a version before 0.2 has saved.

    Args:
        key (str): the name in the file.

    Returns:
        str: the name that it has now.
    """
    for container, part in FIRST_CONTAINERS.items():
        key = key.replace(f".{container}.", f".softmoa_mixture.{part}.")
    return key


def name_in_model(key: str, adapter_name: str = "") -> str:
    """The name that a tensor of an adapter has in the base model, without the adapter's name.

    Args:
        key (str): its name in a file, or in a model's state.
        adapter_name (str): the adapter's name, if the state has it. Default: it does not.

    Returns:
        str: the name.
    """
    # FSDP wraps modules, and its state has the names without the wrapping.
    name = name_since_0_2(key).replace("_fsdp_wrapped_module.", "").removeprefix("base_model.model.")
    return name.replace(f".softmoa_mixture.{adapter_name}.", ".softmoa_mixture.") if adapter_name else name


def rename_first_containers() -> None:
    """Let transformers, which reads adapters by itself, find the tensors of adapters from before version 0.2.

    It first adds the adapter's name to a tensor's name, and then applies its own list of renamings; doing it again
    changes nothing.
    """
    renamings = get_checkpoint_conversion_mapping("legacy")
    if any(pattern.startswith("softmoa") for renaming in renamings for pattern in renaming.source_patterns):
        return
    renamings += [
        WeightRenaming(rf"{container}\.([^\.]+)", rf"softmoa_mixture.\1.{part}")
        for container, part in FIRST_CONTAINERS.items()
    ]
    register_checkpoint_conversion_mapping("legacy", renamings, overwrite=True)


def register(config_cls: type, model_cls: type) -> None:
    """Register the tuner under `PeftType.SOFTMOA` and the prefix `softmoa_`; doing it again changes nothing.

    Args:
        config_cls (type): the configuration class.
        model_cls (type): the tuner class.

    Raises:
        ImportError: if another library has registered this method.
    """
    present = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(SOFTMOA)
    if present is None:
        peft.utils.register_peft_method(name="softmoa", prefix="softmoa_", config_cls=config_cls, model_cls=model_cls)
    elif present.__module__ == config_cls.__module__:
        # A reloaded module brings new classes under the old names.
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[SOFTMOA] = config_cls
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[SOFTMOA] = model_cls
    else:
        raise _unsupported(f"{present.__module__}.{present.__qualname__} has registered SOFTMOA already")
