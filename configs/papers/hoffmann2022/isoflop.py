"""The best size for a budget of FLOPs: Hoffmann et al. 2022 (arXiv:2203.15556), section 3.2, figure 3.

    python benchmarks/gcide_text.py runs/gcide.jsonl
    bigmodel study run configs/papers/hoffmann2022/isoflop.py --workdir runs/isoflop --processes 2
    bigmodel study report configs/papers/hoffmann2022/isoflop.py --workdir runs/isoflop
    bigmodel scaling fit configs/papers/hoffmann2022/isoflop.py --workdir runs/isoflop      the parabolas

The paper trains sizes from under 70M to over 10B at nine budgets of 6e18 to 3e21 FLOPs: each budget has a valley, and
its bottom moves to larger models as N ~ C^0.49. Here: widths of configs/ladders/bytes.py and two smaller ones (bytes of
Webster's dictionary, one layer, mup, one rate) at three budgets, C = 6 N D with embeddings counted; runs of less than
100 or more than 8,000 steps are left out. The claims are of the valley's walls and of their crossing: what is better at
the small budget is worse at ten times that.

Came out, as a pilot of two seeds (results/studies/isoflop): the three valleys are there, and their bottoms, 21k, 40k
and 71k parameters, grow as C^0.53. By the claims' pairs, 40k is 0.10 bits per byte ahead of 7k and 0.63 of 230k at the
small budget, and at ten times that level with 135k (0.01 ahead: the bottom lies between them). All three are undecided
with two seeds; 8, 3 and 12 would settle gains and spreads like these. A seed takes 18 CPU minutes.
"""

from configs import gpt2
from configs.ladders import bytes as ladder

BUDGETS = (3e11, 1e12, 3e12)
WIDTHS = {"7k": 16, "21k": 32, **ladder.WIDTHS}


def get_study():
    variants = {}
    for budget in BUDGETS:
        for name, width in WIDTHS.items():
            steps = round(budget / 6 / parameters(width) / (ladder.ROWS * ladder.LENGTH))
            if name != ladder.LARGE[0] and 100 <= steps <= 8000:
                variants[f"{name}, {budget:.0e} FLOPs"] = {"steps": steps} | ladder.width(width)
    small, large = (f"{budget:.0e} FLOPs" for budget in (BUDGETS[0], BUDGETS[-1]))
    return dict(
        name="isoflop",
        title="The best size for a budget",
        source="Hoffmann et al. 2022 (arXiv:2203.15556), section 3.2, figure 3",
        base=ladder.base(),
        variants=variants,
        seeds=(0, 1, 2, 3, 4),
        metric="validation/bits_per_byte",
        mode="min",
        baseline=f"40k, {small}",
        claims=(
            dict(better=f"40k, {small}", worse=f"7k, {small}", text="At the small budget 7k parameters are too few"),
            dict(better=f"40k, {small}", worse=f"230k, {small}", text="At the small budget 230k are too many"),
            dict(better=f"135k, {large}", worse=f"40k, {large}", text="At ten times that 135k are better than 40k"),
        ),
        full=gpt2.get_config("124m"),
        budget_minutes=90,
    )  # fmt: skip


def parameters(width):
    """Of the layer, the embedding, which is the head too, and three norms."""
    return 12 * width**2 + 259 * width + 3 * width
