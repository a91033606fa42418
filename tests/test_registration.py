import copy
import json
import pickle
import subprocess
import sys
import types

import peft
import pytest
from peft import PeftType, mapping

from peft_softmoa import SoftMoAConfig, SoftMoAModel, registration
from peft_softmoa.registration import SOFTMOA, add_peft_type, register


def test_the_member_is_like_the_others():
    assert PeftType.SOFTMOA is SOFTMOA is PeftType["SOFTMOA"] is PeftType("SOFTMOA")
    assert SOFTMOA == "SOFTMOA" and SOFTMOA.name == SOFTMOA.value == "SOFTMOA"
    assert isinstance(SOFTMOA, PeftType)
    assert repr(SOFTMOA) == repr(PeftType.LORA).replace("LORA", "SOFTMOA")
    assert str(SOFTMOA) == str(PeftType.LORA).replace("LORA", "SOFTMOA")
    assert SOFTMOA in PeftType and SOFTMOA in list(PeftType) and "SOFTMOA" in PeftType.__members__
    if sys.version_info >= (3, 12):  # before, the `in` of an enum takes members only
        assert "SOFTMOA" in PeftType


def test_the_second_list_of_values_has_it():
    """Python keeps it since 3.12.3 and 3.13.1, and answers `in` from it; here any Python does."""
    script = """
from peft.utils import PeftType
if not hasattr(PeftType, "_hashable_values_"):
    type.__setattr__(PeftType, "_hashable_values_", [member.value for member in PeftType])
import peft_softmoa
assert PeftType._hashable_values_ == [member.value for member in PeftType]
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_member_survives_copy_pickle_and_json():
    for duplicate in (copy.copy(SOFTMOA), copy.deepcopy(SOFTMOA), pickle.loads(pickle.dumps(SOFTMOA))):
        assert duplicate is SOFTMOA
    assert json.loads(json.dumps({"peft_type": SOFTMOA})) == {"peft_type": "SOFTMOA"}


def test_method_and_prefix_are_registered():
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[SOFTMOA] is SoftMoAConfig
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[SOFTMOA] is SoftMoAModel
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING[SOFTMOA] == "softmoa_"


def test_other_types_stay_as_they_were():
    script = """
import peft
before = [(m.name, m.value, hash(m)) for m in peft.PeftType]
configs = dict(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)
import peft_softmoa
after = [(m.name, m.value, hash(m)) for m in peft.PeftType]
assert after[:-1] == before and after[-1][0] == "SOFTMOA", after
assert {k: v for k, v in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items() if k != "SOFTMOA"} == configs
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_doing_it_again_changes_nothing():
    before = list(PeftType)
    assert add_peft_type("SOFTMOA") is SOFTMOA
    register(SoftMoAConfig, SoftMoAModel)
    assert list(PeftType) == before
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[SOFTMOA] is SoftMoAConfig


def test_a_fresh_import_registers_its_own_classes():
    script = """
import sys
import peft_softmoa
old = peft_softmoa.SoftMoAConfig
for name in [name for name in sys.modules if name.startswith("peft_softmoa")]:
    del sys.modules[name]
import peft_softmoa
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as configs
assert peft_softmoa.SoftMoAConfig is not old and configs["SOFTMOA"] is peft_softmoa.SoftMoAConfig
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_another_library_under_the_same_name_is_an_error(monkeypatch):
    foreign = type("SoftMoAConfig", (), {"__module__": "somewhere.else"})
    monkeypatch.setitem(mapping.PEFT_TYPE_TO_CONFIG_MAPPING, SOFTMOA, foreign)
    with pytest.raises(ImportError, match="somewhere.else.SoftMoAConfig has registered SOFTMOA already"):
        register(SoftMoAConfig, SoftMoAModel)


@pytest.mark.parametrize("version", ["0.9.0", "0.20.0"])
def test_old_peft_is_refused_with_the_versions_that_work(monkeypatch, version):
    monkeypatch.setattr(peft, "__version__", version)
    with pytest.raises(ImportError, match=rf"peft {version}.*too old.*peft >= 0\.21\.0"):
        add_peft_type("SOFTMOA")


def test_a_peft_type_that_is_no_enum_is_refused(monkeypatch):
    monkeypatch.setattr(registration, "PeftType", types.new_class("PeftType"))
    with pytest.raises(ImportError, match="no longer an enum.*peft >= 0\\.21\\.0"):
        add_peft_type("SOFTMOA")
