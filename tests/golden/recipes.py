"""What golden stores there are: every codec, every length of shorts, overlays and an audit."""

from __future__ import annotations

from dataclasses import dataclass, field

DEFAULT_SCALARS = ("label_logprob", "label_rank", "entropy")


@dataclass(frozen=True)
class Recipe:
    """One golden store. ``max_tokens`` is the length of its longer samples."""

    name: str
    vocab_size: int
    selection: str
    scalars: tuple[str, ...] = DEFAULT_SCALARS
    max_tokens: int = 24
    unit_tokens: int = 60
    audit_fraction: float = 0.0
    sealed: bool = True
    texts: bool = True
    reward: bool = False
    draws: dict[str, int] = field(default_factory=dict)
    scalar_overlays: dict[str, tuple[str, ...]] = field(default_factory=dict)


RECIPES = (
    Recipe(
        "pps-50257",
        50_257,
        "pps:tau=0.06",
        reward=True,
        draws={"second": 1},
        scalar_overlays={"lse": ("lse", "lse_T2.0")},
    ),
    Recipe("pps-500000", 500_000, "pps:tau=0.01", max_tokens=12),
    Recipe("pps-5000-t2", 5_000, "pps:temperature=2.0,tau=0.2", texts=False),
    Recipe("pps-audit-300", 300, "pps:tau=0.06", audit_fraction=0.25),
    Recipe(
        "counts-131072",
        131_072,
        "counts:n=50",
        scalars=("label_logprob", "lse"),
        draws={"again": 1},
        scalar_overlays={"ranks": ("label_rank", "entropy")},
    ),
    Recipe("counts-5000-t1.5", 5_000, "counts:temperature=1.5,n=500"),
    Recipe("counts-50", 50, "counts:n=1", scalars=(), sealed=False, texts=False),
    Recipe("topk-131072", 131_072, "topk:k=50", scalars=(*DEFAULT_SCALARS, "lse", "lse_T1.5")),
    Recipe("topk-50", 50, "topk:k=60", scalars=("entropy",)),
    Recipe("topp-5000", 5_000, "topp:p=0.95,max_k=100"),
    Recipe("full-50", 50, "full"),
)
