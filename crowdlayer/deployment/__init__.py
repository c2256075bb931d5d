"""The model after the run: its files for other programs, its exports, and the classifier read back from them."""
