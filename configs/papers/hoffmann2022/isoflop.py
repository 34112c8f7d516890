"""The best size for a budget of FLOPs: Hoffmann et al. 2022 (arXiv:2203.15556), section 3.2, figure 3.

    python benchmarks/gcide_text.py runs/gcide.jsonl
    bigmodel study run configs/papers/hoffmann2022/isoflop.py --workdir runs/isoflop --processes 2
    bigmodel study report configs/papers/hoffmann2022/isoflop.py --workdir runs/isoflop
    bigmodel scaling fit configs/papers/hoffmann2022/isoflop.py --workdir runs/isoflop      the parabolas

The paper trains sizes from under 70M to over 10B at nine budgets of 6e18 to 3e21 FLOPs: each budget has a valley, and
its bottom moves to larger models as N ~ C^0.49. Here: sizes of configs/ladders/bytes.py and one smaller (bytes of
Webster's dictionary, mup of width and depth, one rate) at three budgets, C = 6 N D with embeddings counted; runs of
less than 100 or more than 8,000 steps are left out. The claims are of the valley's walls and of their crossing: what is
better at the small budget is worse at ten times that.
"""

from configs import gpt2
from configs.ladders import bytes as ladder

BUDGETS = (3e11, 1e12, 3e12)
SIZES = {"10k": (2, 16), **ladder.SIZES}
PARAMETERS = {"10k": 10_368, "33k": 33_024, "67k": 67_968, "164k": 164_480, "251k": 251_680, "357k": 357_312}


def get_study():
    study = ladder.get_study()
    variants = {}
    for budget in BUDGETS:
        for name, parameters in PARAMETERS.items():
            steps = round(budget / 6 / parameters / (ladder.ROWS * ladder.LENGTH))
            if 100 <= steps <= 8000:
                variants[f"{name}, {budget:.0e} FLOPs"] = ladder.size(*SIZES[name]) | {"steps": steps}
    small, large = (f"{budget:.0e} FLOPs" for budget in (BUDGETS[0], BUDGETS[-1]))
    return dict(
        name="isoflop",
        title="The best size for a budget",
        source="Hoffmann et al. 2022 (arXiv:2203.15556), section 3.2, figure 3",
        base=study["base"],
        variants=variants,
        seeds=(0, 1, 2, 3, 4),
        metric="validation/bits_per_byte",
        mode="min",
        baseline=f"33k, {small}",
        claims=(
            dict(better=f"33k, {small}", worse=f"10k, {small}", text="At the small budget 10k parameters are too few"),
            dict(better=f"33k, {small}", worse=f"164k, {small}", text="At the small budget 164k are too many"),
            dict(better=f"164k, {large}", worse=f"33k, {large}", text="At ten times that 164k are better than 33k"),
        ),
        full=gpt2.get_config("124m"),
        budget_minutes=90,
    )  # fmt: skip
