"""The SwiftKV pipeline: recipes, data, calibration, distillation, export, evaluation and serving."""

import os

# Where a launcher has set several processes to work, waiting OpenMP threads sleep at once (read when torch loads): a
# thread that spins would keep its neighbours' from running. A process alone is left to OpenMP's own way, some
# milliseconds of spinning first, without which a training step takes 1.3 to 1.6 times as long in a virtual machine.
if os.environ.get("WORLD_SIZE", "1") != "1":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
