"""Laws over several processes: `tests/test_distributed.py` starts them."""
