"""laid: long-window anchoring distillation for vision-language models (Zhou et al., AAAI 2026)."""

__version__ = "0.1.0"
