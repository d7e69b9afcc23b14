"""Training the embedded checkpoint from nothing: ``svdlab train-tiny``, and measuring it: ``svdlab evaluate``."""
