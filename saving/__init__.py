"""A checkpoint on disk: saved atomically, with the code that loads it and checksums. Imports nothing of ours."""
