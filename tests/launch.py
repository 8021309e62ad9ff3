"""What the tests start as a process of its own, or by torchrun: scripts by name on a small set of shapes, several with "+" between them."""
import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402

SMALL = {"train": 160, "val": 32, "test": 48, "unseen-shape-colour": 16, "unseen-colour-frame": 16}  # of the shapes, instead of 42,000


def main(words):
    """Run each script with its flags; with STOP_AFTER=n in the environment each finds after its n-th step that it was asked to stop."""
    data.SHAPES_COUNTS = SMALL
    if stop := int(os.environ.get("STOP_AFTER", 0)):
        data.Run.stopping = lambda run, asked=[]: asked.append(1) or len(asked) == stop
    if "+" in words:  # one process group for all of them
        data.dist.destroy_process_group = lambda: None
    while words:
        end = words.index("+") if "+" in words else len(words)
        importlib.import_module(words[0]).main(words[1:end])
        words = words[end + 1:]


if __name__ == "__main__":
    main(sys.argv[1:])
