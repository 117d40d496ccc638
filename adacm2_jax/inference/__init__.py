"""Videos in, answers out: reading a video into the memory, text to ids, decoding."""
