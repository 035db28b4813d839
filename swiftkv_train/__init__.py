"""The SwiftKV pipeline: recipes, data, calibration, distillation, export, evaluation and serving."""
