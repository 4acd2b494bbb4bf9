"""Trains recipe after recipe in one group of processes; `accelerate launch … -m tests.training.several FILE`.

Not a test. FILE is a list of recipes as JSON, in which $RANK is the process' own; what comes of each lies
where its recipe says.
"""

import json
import os
import sys
from pathlib import Path

from training.recipe import Recipe
from training.train import train


def main() -> None:
    for settings in json.loads(os.path.expandvars(Path(sys.argv[1]).read_text())):
        train(Recipe.from_mapping(settings, source="the test"), progress=False)


if __name__ == "__main__":
    main()
