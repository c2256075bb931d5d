"""Folders, buckets and archives: what is read from them and put to them, checked."""
