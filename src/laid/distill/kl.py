"""L_KL: the divergence of the student's answers from the teacher's (paper, eq. 8), at answer positions only.

Of a long answer a cache keeps the teacher's k largest logits and the sum of the others (`TopK`): the vocabulary is then k tokens and
"any other". That divergence is never above the whole one, and the difference is

    r * KL(p | other  ||  q | other),      r the teacher's probability of all other tokens

which is at most r * log(max p/q there): `top_kl_error` bounds it from what is at hand. With r = 0 it is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from laid.errors import LaidError


def common_rows(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut both logits (..., vocabulary) to the rows both have, before any softmax.

    Qwen2.5-VL pads its vocabulary to 151,936 rows (3B) or 152,064 (7B, 32B) for one tokenizer of 151,665 tokens: the
    surplus rows name no token, so leaving them out and normalising over the rest loses nothing.
    Raises LaidError when the leading shapes differ.
    """
    if student.shape[:-1] != teacher.shape[:-1]:
        raise LaidError(
            f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} are not for the same"
            " positions: pass both at the same answer positions"
        )
    rows = min(student.shape[-1], teacher.shape[-1])
    return student[..., :rows], teacher[..., :rows]


def forward_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float = 1.0,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """tau^2 * KL(p^t(tau) || p^s(tau)), averaged over positions (eq. 8). A scalar, in nats, float32 or float64.

    student: (positions..., vocabulary) logits; teacher: the same positions, perhaps another vocabulary size, perhaps
        from a cache in half precision. Both are raised to float32 first. weights: (positions...), not negative.
    Raises LaidError on different positions, a temperature that is not positive, or no position.
    """
    return temperature**2 * _mean(kl_rows(student, teacher, temperature), weights)


@dataclass(frozen=True)
class TopK:
    """A teacher's word at n positions, cut to its k largest logits.

    values, ids: (n, k) logits and their tokens. rest: temperature -> (n,) logsumexp of the other logits / temperature.
    words: rows of its vocabulary.
    """

    values: torch.Tensor
    ids: torch.Tensor
    rest: dict[float, torch.Tensor]
    words: int

    @classmethod
    def of(cls, logits: torch.Tensor, k: int, temperatures: tuple[float, ...] = (1.0,)) -> TopK:
        """logits: (n, words) with words above k."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        values, ids = logits.topk(k, dim=-1)
        others = logits.scatter(-1, ids, -torch.inf)
        return cls(values, ids, {t: (others / t).logsumexp(-1) for t in temperatures}, logits.shape[-1])

    def __getitem__(self, part: slice) -> TopK:
        rest = {t: x[part] for t, x in self.rest.items()}
        return replace(self, values=self.values[part], ids=self.ids[part], rest=rest)

    def __len__(self) -> int:
        return len(self.values)

    def to(self, device: torch.device | str) -> TopK:
        rest = {t: x.to(device) for t, x in self.rest.items()}
        return replace(self, values=self.values.to(device), ids=self.ids.to(device), rest=rest)

    def log_probabilities(self, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, k) of the tokens and (n,) of all others together. Raises LaidError for a temperature that was not kept."""
        if temperature not in self.rest:
            raise LaidError(
                f"the teacher's {self.values.shape[1]} largest logits were kept for temperatures"
                f" {', '.join(f'{t:g}' for t in self.rest)}, not {temperature:g}: make the cache again"
            )
        rest = self.rest[temperature].to(self.values.dtype)
        total = torch.logaddexp((self.values / temperature).logsumexp(-1), rest)
        return self.values / temperature - total[:, None], rest - total


def kl_rows(student: torch.Tensor, teacher: torch.Tensor | TopK, temperature: float = 1.0) -> torch.Tensor:
    """KL(p^t(tau) || p^s(tau)) of each position: (positions...). A TopK gives the divergence over its tokens and "any other".

    Raises LaidError as `forward_kl` does.
    """
    if isinstance(teacher, TopK):
        log_p, log_q, rest_p, rest_q = _cut(student, teacher, temperature)
        return _kl(log_p, log_q) + torch.where(rest_p > -torch.inf, rest_p.exp() * (rest_p - rest_q), 0.0)
    log_s, log_t = _log_probabilities(student, teacher, temperature)
    return _kl(log_t, log_s)


@torch.no_grad()
def top_kl_error(student: torch.Tensor, teacher: TopK, temperature: float = 1.0) -> torch.Tensor:
    """(n,) what the whole divergence may be above that of `kl_rows`, at most.

    r * log(min(1, p_k / r) * (1 - q of the kept) / (least q of another)): no other token of the teacher is likelier than its k-th.
    """
    student = student[..., : teacher.words]
    log_p, _, rest_p, rest_q = _cut(student, teacher, temperature)
    log_q = (student.float() / temperature).log_softmax(-1)
    least = log_q.scatter(-1, teacher.ids.clamp_max(student.shape[-1] - 1), torch.inf).amin(-1)
    return rest_p.exp() * ((log_p[:, -1] - rest_p).clamp_max(0) + rest_q - least)


def _cut(student, teacher, temperature):
    """Log-probabilities of the kept tokens (n, k), teacher and student, and of all others together (n,)."""
    if not temperature > 0:
        raise LaidError(f"temperature must be above 0, got {temperature}")
    if len(student) != len(teacher):
        raise LaidError(
            f"{len(student)} positions of the student and {len(teacher)} of the teacher: pass the same"
        )
    log_p, rest_p = teacher.log_probabilities(temperature)
    wide = torch.promote_types(student.dtype, torch.float32)
    student = student[..., : teacher.words].to(wide) / temperature
    nameless = teacher.ids >= student.shape[-1]  # a row that names no token, and the student does not have
    ids = teacher.ids.clamp_max(student.shape[-1] - 1)
    log_p = log_p.masked_fill(nameless, -torch.inf)
    total = student.logsumexp(-1)
    rest_q = student.scatter(-1, ids, -torch.inf).logsumexp(-1) - total
    return log_p, student.gather(-1, ids) - total[:, None], rest_p, rest_q


def _log_probabilities(student, teacher, temperature):
    if not temperature > 0:
        raise LaidError(f"temperature must be above 0, got {temperature}")
    student, teacher = common_rows(student, teacher)
    wide = torch.promote_types(student.dtype, torch.float32)
    return ((x.to(wide) / temperature).log_softmax(-1) for x in (student, teacher))


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) over the last dimension; a row with p = 0 (logit -inf) adds nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p)).sum(-1)


def _mean(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    if not values.numel():
        raise LaidError("no answer position: the divergence has nothing to average")
    if weights is None:
        return values.mean()
    weights = weights.to(values.dtype)
    if not bool(weights.sum() > 0):
        raise LaidError(f"no answer position: the weights of all {values.numel()} positions are 0")
    return (values * weights).sum() / weights.sum()
