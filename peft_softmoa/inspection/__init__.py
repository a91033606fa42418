"""What the experts of a mixture do: records, metrics, reports; pictures are in `inspection.plots`."""

from .blocks import BlockReport
from .callback import ExpertUtilizationCallback
from .confusion import Confusion
from .findings import Finding
from .maps import ReadingMap, reading_map
from .metrics import (
    class_information,
    coefficient_of_variation,
    combine_similarity,
    effective_number,
    effective_tokens,
    expert_load,
    idle_experts,
    normalized_entropy,
    output_share,
    slot_similarity,
)
from .records import Record, find_layers, record_routing
from .report import ExpertReport, expert_report
from .streams import StreamReading, stream_reading

__all__ = [
    "BlockReport",
    "Confusion",
    "ExpertReport",
    "ExpertUtilizationCallback",
    "Finding",
    "ReadingMap",
    "Record",
    "StreamReading",
    "class_information",
    "coefficient_of_variation",
    "combine_similarity",
    "effective_number",
    "effective_tokens",
    "expert_load",
    "expert_report",
    "find_layers",
    "idle_experts",
    "normalized_entropy",
    "output_share",
    "reading_map",
    "record_routing",
    "slot_similarity",
    "stream_reading",
]
