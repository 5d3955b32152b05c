"""What people train the encoder with, beside transformers' `Trainer`."""
