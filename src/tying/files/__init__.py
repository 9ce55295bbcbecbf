"""Files that appear whole or not at all, in few bytes, and whose damage is noticed."""
