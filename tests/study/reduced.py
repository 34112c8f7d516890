"""A paper's study with everything in it but patience: two variants, two seeds, a few steps. Run by .ci/run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configs.papers.zhang2018 import mixup_smoothing  # noqa: E402


def get_study():
    study = mixup_smoothing.get_study()
    study["base"].update(steps=20)
    study["base"].model.update(depth=8, channels=8)
    study["base"].eval.every = 10
    kept = ("plain", "mixup")
    return study | {
        "name": "reduced",
        "variants": {name: study["variants"][name] for name in kept},
        "claims": tuple(claim for claim in study["claims"] if {claim["better"], claim["worse"]} <= set(kept)),
        "seeds": (0, 1),
    }
