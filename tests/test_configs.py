"""Every shipped config builds and lowers from shapes alone, with the parameters its paper counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigmodel_jax import experiment, tree
from bigmodel_jax.programs import Programs

ROOT = Path(__file__).resolve().parent.parent

# Parameters: GPT-2 as released (the paper's 117M and 345M were miscounts of these); Llama model cards;
# BERT base and large with their MLM head and without pooler and next-sentence head; torchvision's
# ResNets; He et al. 2016 (table 6) for CIFAR, whose option A shortcuts hold no parameters.
PARAMETERS = {
    "gpt2.py:124m": 124_439_808,
    "gpt2.py:350m": 354_823_168,
    "gpt2.py:1.5b": 1_557_611_200,
    "llama.py:1b": 1_235_814_400,
    "llama.py:8b": 8_030_261_248,
    "llama.py:70b": 70_553_706_496,
    "mixtral.py": 46_702_792_704,
    "bert.py:base": 109_514_298,
    "bert.py:large": 335_174_458,
    "resnet_imagenet.py:18": 11_689_512,
    "resnet_imagenet.py:34": 21_797_672,
    "resnet_imagenet.py:50": 25_557_032,
    "resnet_imagenet.py:101": 44_549_160,
    "resnet_imagenet.py:152": 60_192_808,
    "resnet_cifar10.py:20": 269_722,
    "resnet_cifar10.py:56": 853_018,
    "resnet_cifar10.py:110": 1_727_962,
    "resnet_cifar10.py:plain20": 269_722,
    "resnet_cifar10.py:plain56": 853_018,
    "resnet_cifar10.py:plain110": 1_727_962,
}
SMALL = ["--config.microbatch=0", "--config.batch_size=64", "--config.eval.batch_size=64"]


def small() -> list[str]:
    """FILE.py:ARG of the configs that run on a laptop; of arguments that differ in their fold, the first."""
    full = {name.split(":")[0] for name in PARAMETERS}
    found = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        if path.name not in full:
            words = experiment.arguments(str(path)) or ("",)
            kinds = {word.split(",")[0] if not word.isdigit() else "": word for word in reversed(words)}
            found += [f"{path.name}:{word}".rstrip(":") for word in kinds.values()]
    return found


@pytest.mark.parametrize("name", small())
def test_small_configs_lower(name):
    """Sizes that they take from their data are given here; no data is read."""
    config = experiment.read(str(ROOT / "configs" / name))
    rows = -(-config["batch_size"] // 8) * 8  # for eight devices
    wanted = experiment.resolve(config, ["--config.init_from.path=", f"--config.batch_size={rows}"])
    sizes = {"in_channels": 1, "image_size": 8, "num_features": 64}
    model = wanted["model"]
    model |= {leaf: sizes.get(leaf, 300) for leaf in experiment.FROM_DATA if model.get(leaf) == 0}
    programs = Programs(experiment.build(wanted, load=False))
    assert "stablehlo.dot_general" in programs.lower_step(rows).as_text()


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_full_scale_configs_lower_on_eight_devices(name):
    config = experiment.read(str(ROOT / "configs" / name))
    fsdp = ["--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.mesh.tensor=2"]
    exp = experiment.build(experiment.resolve(config, [*SMALL, *fsdp]), load=False)
    programs = Programs(exp)
    assert tree.count(programs.state["params"]) == PARAMETERS[name]
    text = programs.lower_step(64).as_text()
    assert "sdy.sharding" in text or "mhlo.sharding" in text
    if config["model"].get("dtype") == "bfloat16" and config["model"]["name"] != "resnet":
        products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        narrow = [line for line in products if "bf16" in line]
        # Scores, head and loss are kept in float32 by the dtype policy; weights are multiplied in bf16.
        assert len(narrow) > len(products) / 2
