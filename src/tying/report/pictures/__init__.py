"""The pictures of the page, one idea per file: plain data in, a `Picture` out."""
