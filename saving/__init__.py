"""A checkpoint on disk: saved atomically, with the code that loads it and checksums. Imports nothing of ours.

Three modules go with every checkpoint: `saving_`, `checkpoint_code_` and `checksums_deepseek_ocr_vision`. `atomic`,
`staging` and `code` stay here, so a checkpoint's own code saves as transformers does where the package is missing.
"""
