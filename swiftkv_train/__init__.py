"""The SwiftKV pipeline: recipes, data, calibration, distillation, export, evaluation and serving."""

import os

# Waiting OpenMP threads sleep instead of spinning (read when torch loads). Spinning gains nothing measurable here and,
# where another process wants a core too, makes a training step more than ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
