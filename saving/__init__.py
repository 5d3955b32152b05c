"""A checkpoint on disk: saved atomically, with the code that loads it and checksums. Imports nothing of ours.

`saving_deepseek_ocr_vision` goes with every checkpoint. `atomic`, `staging`, `code` and `checksums` stay here, so a
checkpoint's own code saves as transformers does where the package is missing.
"""
