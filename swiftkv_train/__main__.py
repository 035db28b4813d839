"""`python -m swiftkv_train`: the command `swiftkv`."""

from swiftkv_train.cli import main

main()
