from swiftkv_train.cli import main

main()
