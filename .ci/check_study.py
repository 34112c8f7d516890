"""Whether the report of tests/study/reduced.py has what was run: two seeds of two variants, and a judged claim."""

import json
import sys
from pathlib import Path

report = json.loads(Path(sys.argv[1]).read_text())
assert [(v["name"], v["n"]) for v in report["variants"]] == [("plain", 2), ("mixup", 2)], report["variants"]
assert [claim["verdict"] in ("supported", "contradicted", "undecided") for claim in report["claims"]] == [True]
assert report["claims"][0]["sentence"] and len(report["cells"]) == 4 and not report["warnings"], report["warnings"]
