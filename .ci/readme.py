"""Print the shell block of README.md that follows `<!-- ci: NAME -->`."""

import re
import sys

text = open("README.md", encoding="utf-8").read()
match = re.search(rf"<!-- ci: {re.escape(sys.argv[1])} -->\n```bash\n(.*?)```", text, re.S)
if match is None:
    sys.exit(f"README.md has no block marked ci: {sys.argv[1]}")
print(match[1])
