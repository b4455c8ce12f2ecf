"""What tables and figures call a method, and in which order they list methods."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from laid.settings import Settings

# The methods that come with laid, in the paper's order; any other is called by its label or its own name.
SHIPPED = {
    "base": "base",
    "yarn": "YaRN",
    "self_extend": "SelfExtend",
    "sft": "SFT",
    "kd": "KD (ours)",
    "laid": "LAid",
    "laid_plus": "LAid+",
    "laid_wo_kl": "LAid w/o KL",
    "laid_wo_laid": "LAid w/o alignment",
    "laid_plus_noisy": "LAid+ (1 label in 5 wrong)",
    "laid_plus_noisy_wo_kl": "LAid+ w/o KL (1 label in 5 wrong)",
}
NOT_IN_PAPER = ("kd", "laid_plus")
# The methods that the claims are tested for. What one is without a part of it is called <method>_wo_<part>.
LAID = ("laid", "laid_plus")


def ablations(method: str, methods: Iterable[str]) -> list[str]:
    """Those of `methods` that are `method` without a part."""
    return [name for name in methods if name.startswith(f"{method}_wo_")]


class Names(dict[str, str]):
    """Method -> its name, in the order of tables; a method that the configuration no longer has keeps its own name."""

    def __missing__(self, method: str) -> str:
        return method

    def ordered(self, methods) -> list[str]:
        """Methods in the order of tables, unknown ones last."""
        order = {name: i for i, name in enumerate(self)}
        return sorted(methods, key=lambda method: (order.get(method, len(order)), method))


def method_names(settings: Settings) -> Names:
    """The shipped methods first, then the configuration's own in its order; `methods.<name>.label` counts most.

    SFT says whether it trains an adapter, as the paper's does.
    """
    labels = {
        name: method.label or SHIPPED.get(name) or _without(name) for name, method in settings.methods.items()
    }
    sft = settings.methods.get("sft")
    if sft is not None and sft.label is None and sft.lora is not None:
        labels["sft"] = f"{SHIPPED['sft']} (LoRA)"
    return Names({name: labels.get(name, SHIPPED.get(name)) for name in (*SHIPPED, *labels)})


def _without(name: str) -> str:
    """An ablation's name after its method's, "LAid+ w/o gaps"; any other method's as it is."""
    method, _, part = name.partition("_wo_")
    return f"{SHIPPED[method]} w/o {'KL' if part == 'kl' else part}" if part and method in SHIPPED else name
