from places import pytest_generate_tests, run_interpreted  # noqa: F401
