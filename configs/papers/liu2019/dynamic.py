"""Dynamic against static masking: Liu et al. 2019 (arXiv:1907.11692), section 4.1, table 1.

    bigmodel study run configs/papers/liu2019/dynamic.py --workdir runs/dynamic --processes 2
    bigmodel study report configs/papers/liu2019/dynamic.py --workdir runs/dynamic

As configs/papers/devlin2019/masking.py, whose runs with 80/10/10 are the dynamic ones here: in the same workdir they
are not made twice. Static masks are drawn once for each row, dynamic ones anew each time it is read. 2,400 steps read a
row seven times, so that often is a static mask seen; the paper draws ten static masks for each text and sees each of
them four times.
"""

from configs import bert
from configs.papers.devlin2019 import masking


def get_study():
    static = masking.PRETRAIN | {"data": masking.PRETRAIN["data"] | {"static": True}}
    full = bert.get_config("base")
    full.data.static = True
    return dict(
        name="dynamic",
        title="Dynamic against static masking",
        source="Liu et al. 2019 (arXiv:1907.11692), section 4.1, table 1",
        base=masking.base(),
        first={"dynamic": masking.PRETRAIN, "static": static},
        variants={name: masking.start(name) for name in ("static", "dynamic")},
        seeds=(0, 1, 2, 3, 4),
        metric="validation/accuracy",
        mode="max",
        baseline="static",
        claims=(
            dict(better="dynamic", worse="static", text="Dynamic masking is better than static"),
            dict(
                better="dynamic",
                worse="static",
                margin=-0.01,
                text="Dynamic masking is at least as good as static (within a point)",
            ),
        ),
        published={"static": 92.5, "dynamic": 92.9},
        published_metric="SST-2 accuracy after fine-tuning, %",
        published_source="Liu et al. 2019, table 1",
        full=full,
        budget_minutes=90,
    )
