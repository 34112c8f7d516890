"""Dynamic against static masking: Liu et al. 2019 (arXiv:1907.11692), section 4.1, table 1.

    bigmodel study run configs/papers/liu2019/dynamic.py --workdir runs/dynamic --processes 2
    bigmodel study report configs/papers/liu2019/dynamic.py --workdir runs/dynamic

As configs/papers/devlin2019/masking.py: pretrained on reviews, fine-tuned to judge them. Static masks are drawn once
for each text, dynamic ones anew each time it is seen; the paper's static ones are ten to each text. 3,200 steps
are about eight epochs, so that a static mask is seen eight times; the paper sees each of its masks four times.
"""

from configs import bert
from configs.papers.devlin2019 import masking


def get_study():
    longer = masking.PRETRAIN | {"steps": 3200, "eval.every": 800}
    full = bert.get_config("base")
    full.data.static = True
    return dict(
        name="dynamic",
        title="Dynamic against static masking",
        source="Liu et al. 2019 (arXiv:1907.11692), section 4.1, table 1",
        base=masking.base(),
        first={"dynamic": longer, "static": longer | {"data": longer["data"] | {"static": True}}},
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
