"""Tensor operations of SwiftKV training and inference. Needs torch; uses triton where it is present; knows no transformers."""
