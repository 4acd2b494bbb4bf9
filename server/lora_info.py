"""The gauge by which a router finds the server that has an adapter in memory. Knows neither grpc nor torch.

The model server protocol of the Kubernetes Gateway API inference extension asks for it: the value is a time,
the facts are labels. vLLM calls its own `vllm:lora_requests_info`.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

NAME: Final = "quickchange_lora_requests_info"
_LABELS: Final = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")


@dataclass(frozen=True, slots=True)
class LoraInfo:
    """Where a request for an adapter need not wait for a load.

    Attributes:
        fitting: how many adapters the device's memory for adapters holds.
        resident: references to adapters that are on the device, used or not.
        waiting: references to adapters that requests wait for and that are not there.
    """

    fitting: int
    resident: Sequence[str]
    waiting: Sequence[str]


class LoraInfoCollector(Collector):
    """One series, made afresh at every scrape: each list is a label, so that a kept one would be a leak."""

    def __init__(self, source: Callable[[], LoraInfo]) -> None:
        self._source = source

    def describe(self) -> Iterable[Metric]:
        return [self._family()]

    def collect(self) -> Iterable[Metric]:
        info, family = self._source(), self._family()
        lists = (",".join(sorted(info.resident)), ",".join(sorted(info.waiting)))
        family.add_metric((str(info.fitting), *lists), time.time())
        return [family]

    @staticmethod
    def _family() -> GaugeMetricFamily:
        text = "Adapters on the device, and those that requests wait for; the value is the time of the scrape"
        return GaugeMetricFamily(NAME, text, labels=_LABELS)
