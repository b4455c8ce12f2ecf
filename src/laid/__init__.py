"""laid: long-window anchoring distillation for vision-language models (Zhou et al., AAAI 2026).

What other programs may build on is named here (docs/reference/api.md) and imported when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from laid.distill.gain import RopeGain as RopeGain
    from laid.distill.gaps import image_starts as image_starts
    from laid.distill.gaps import open_gaps as open_gaps
    from laid.errors import LaidError as LaidError
    from laid.models.capture import LayerQK as LayerQK
    from laid.models.capture import QKCapture as QKCapture
    from laid.training.loss import LaidLoss as LaidLoss
    from laid.training.teacher_cache import TeacherCache as TeacherCache

__version__ = "0.1.0"

_PUBLIC = {
    "LaidError": "laid.errors",
    "LaidLoss": "laid.training.loss",
    "LayerQK": "laid.models.capture",
    "QKCapture": "laid.models.capture",
    "RopeGain": "laid.distill.gain",
    "TeacherCache": "laid.training.teacher_cache",
    "image_starts": "laid.distill.gaps",
    "open_gaps": "laid.distill.gaps",
}
__all__ = sorted(_PUBLIC)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'laid' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)
