"""What torchrun starts in the tests: a stage by name, on a small set of shapes (see conftest.LAUNCH)."""
import os

exec(os.environ["DLC_LAUNCH"])
