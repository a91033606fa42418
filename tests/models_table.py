"""Write the table of models in `docs/models.md` from the outcome of `test_families.py` and `test_checkpointing.py`.

pytest --models-table
"""

from pathlib import Path

import pytest
from families import FAMILIES, Family
from test_families import PLACEMENTS, PLACES

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- models: written by tests/models_table.py -->\n", "<!-- end of models -->\n"
CHECKPOINTING = "test_gradients_are_the_same"
HEADING = ["model", "attention", "feed-forward", "placements that work", "padding", "gradient checkpointing", "ONNX"]


class Outcomes:
    """A plugin of pytest that keeps what each test says, also in other processes, and writes the table at the end."""

    def __init__(self) -> None:
        self.all: list[tuple[str, dict, str]] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item):
        report = yield
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        simple = {name: value for name, value in parameters.items() if isinstance(value, (str, bool))}
        report.user_properties.append(("case", [item.originalname, simple]))
        return report

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            self.all += [(*value, report.outcome) for key, value in report.user_properties if key == "case"]

    def pytest_sessionfinish(self, session, exitstatus):
        ran = {(name, parameters.get("name")) for name, parameters, _ in self.all}
        all_ran = ran.issuperset((test, name) for test in ("test_placement", CHECKPOINTING) for name in FAMILIES)
        if all_ran and not exitstatus and not hasattr(session.config, "workerinput"):
            before, after = PAGE.read_text().split(BEGIN)
            PAGE.write_text(before + BEGIN + table(self) + END + after.split(END)[1])

    def works(self, test: str, **parameters) -> bool:
        """Whether a test passed, each time that it ran with some parameters."""
        found = [outcome for name, given, outcome in self.all if name == test and parameters.items() <= given.items()]
        return bool(found) and set(found) == {"passed"}


def row(family: Family, outcomes: Outcomes) -> list[str]:
    name = family.name
    placed = [place for place in PLACEMENTS if outcomes.works("test_placement", name=name, placement=place)]
    tries = {"eager": "eager", "SDPA": "sdpa"}
    padding = [label for label, key in tries.items() if outcomes.works("test_padding", name=name, attention=key)]
    if not padding and outcomes.works("test_content_of_padding", name=name):
        padding = ["eager"]
    kinds = {"reentrant or not": (False, True), "not reentrant": (False,)}
    checkpointing = [
        label
        for label, reentrant in kinds.items()
        if all(outcomes.works(CHECKPOINTING, name=name, reentrant=each) for each in reentrant)
    ]
    return [
        name,
        *(f"`{entry}`" if entry == exit else f"`{entry}` to `{exit}`" for entry, exit in PLACES[name][1:]),
        "all" if placed == list(PLACEMENTS) else ", ".join(placed) or "none",
        f"no effect: {', '.join(padding)}" if padding else family.unmasked,
        checkpointing[0] if checkpointing else "none in transformers",
        family.onnx,
    ]


def table(outcomes: Outcomes) -> str:
    rows = [HEADING, ["---"] * len(HEADING), *(row(family, outcomes) for family in FAMILIES.values())]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
